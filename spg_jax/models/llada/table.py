"""The names of the tensors of LLaDA checkpoints (arXiv 2502.09992)."""

from spg_jax.models.transfer import Source, Table

_BLOCK = 'model.transformer.blocks.{layer}.'

TABLE: Table = {
    ('embedding',): Source('model.transformer.wte.weight'),
    ('unembedding',): Source('model.transformer.ff_out.weight', transposed=True),
    ('final_norm', 'scale'): Source('model.transformer.ln_f.weight'),
    ('layers', 'attention_norm', 'scale'): Source(_BLOCK + 'attn_norm.weight'),
    ('layers', 'query', 'kernel'): Source(_BLOCK + 'q_proj.weight', transposed=True),
    ('layers', 'key', 'kernel'): Source(_BLOCK + 'k_proj.weight', transposed=True),
    ('layers', 'value', 'kernel'): Source(_BLOCK + 'v_proj.weight', transposed=True),
    ('layers', 'attention_out', 'kernel'): Source(_BLOCK + 'attn_out.weight', transposed=True),
    ('layers', 'mlp_norm', 'scale'): Source(_BLOCK + 'ff_norm.weight'),
    # The published block multiplies silu(ff_proj(x)) by up_proj(x).
    ('layers', 'gate', 'kernel'): Source(_BLOCK + 'ff_proj.weight', transposed=True),
    ('layers', 'up', 'kernel'): Source(_BLOCK + 'up_proj.weight', transposed=True),
    ('layers', 'down', 'kernel'): Source(_BLOCK + 'ff_out.weight', transposed=True),
}
