"""How completions are decoded: the settings of a sampler, and what is true of it.

Letters: `C` positions of a completion, `b` positions of a block, `k` steps between two refreshes,
`R` rounds of editing.
"""

import dataclasses

from spg_jax.diffusion import informed
from spg_jax.diffusion.samplers import Sampler, find
from spg_jax.errors import check_one_of

RECORDS = ('log_prob', 'entropy', 'kept', 'confidence', 'influence')
CACHES = ('', 'prefix', 'dual')
SCHEDULES = ('even', 'timesteps')


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are decoded (LLaDA, arXiv 2502.09992, algorithms 4 and 5).

    Attributes:
      length: C, the number of completion positions.
      steps: denoising steps over the whole completion, spread evenly over its blocks. A block ends
        sooner where its sampler has committed all of it.
      block_length: b, the positions in a block; a block is finished before the next one starts.
        `block_length == length` decodes the whole completion at once.
      temperature: of the Gumbel-max choice of tokens; 0 takes the most likely token.
      commit: the rule of commitment where `sampler` is empty; the name is older.
      sampler: the rule by which a step commits tokens, a name of `samplers.REGISTRY`, each of which
        `samplers.rules` explains, or the dotted path of a user's own rule; '' is that of `commit`.
      schedule: how many tokens each step of a block commits at least. 'even' spreads them evenly;
        'timesteps' commits the share of the masked tokens that a linear noise schedule removes
        (Dream, arXiv 2508.15487).
      threshold: the probability in (0, 1] from which a token is sure, for 'threshold', 'llada2' and
        'llada21', which commit sure tokens, and for 'remask', which does not take them back.
      factor: f of the sampler 'factor', above 0.
      entropy_bound: of the sampler 'entropy_bounded', in nats, 0 or more.
      remasks: how many tokens of a block 'remask' may take back.
      edit_threshold: the probability in [0, 1] above which another token takes the place of one
        that is there, for 'llada21' and 'autoedit'.
      post_steps: rounds of a block that 'llada21' may take after its last mask has gone.
      edit_rounds: rounds in which 'autoedit' writes the finished completion anew.
      keep_threshold: the probability in [0, 1] below which 'autoedit' writes a token anew.
      cache: which positions are computed at every step. '' computes all of them; 'dual' those of
        the block; 'prefix' those of the block and after it. Keys and values of all others are those
        of the last refresh, so that results are approximate.
      refresh: k, steps of a block between two refreshes. The first step of a block is one.
      guidance: s of classifier-free guidance, logits_u + (1 + s)(logits_c - logits_u); 0 is off.
      stop_early: whether a completion ends with the block that holds its first EOS.
      top_k: tokens are drawn among that many likeliest ids only; 0 is off.
      top_p: tokens are drawn among the fewest likeliest ids that have this probability; 1 is off.
      records: what is recorded of each token when it is committed, names of RECORDS: 'log_prob',
        'entropy' and 'kept' of the law that it was drawn from (`token_law.record`), its
        'confidence', which is its probability among all ids at temperature 1, and its 'influence'
        on masked positions (`informed`). An objective asks for them, not a user.
      influence_window: how far from a token its influence is measured.

    Raises:
      ValueError: for settings that cannot be decoded with; the message names the fix.
    """

    length: int
    steps: int
    block_length: int
    temperature: float
    commit: str = 'low_confidence'
    sampler: str = ''
    schedule: str = 'even'
    threshold: float = 0.9
    factor: float = 1.0
    entropy_bound: float = 0.1
    remasks: int = 4
    edit_threshold: float = 0.9
    post_steps: int = 16
    edit_rounds: int = 3
    keep_threshold: float = 0.5
    cache: str = ''
    refresh: int = 32
    guidance: float = 0.0
    stop_early: bool = True
    top_k: int = 0
    top_p: float = 1.0
    records: tuple[str, ...] = ()
    influence_window: int = informed.WINDOW

    def __post_init__(self) -> None:
        for name in ('length', 'steps', 'block_length'):
            if getattr(self, name) < 1:
                raise ValueError(f'sampling.{name} is {getattr(self, name)}; use at least 1')
        if self.length % self.block_length:
            nearest = -(-self.length // self.block_length) * self.block_length
            raise ValueError(
                f'sampling.length {self.length} is not a multiple of sampling.block_length '
                f'{self.block_length}; use length {nearest} or a block_length that divides '
                f'{self.length}'
            )
        if self.steps % self.blocks:
            nearest = -(-self.steps // self.blocks) * self.blocks
            raise ValueError(
                f'sampling.steps {self.steps} do not spread evenly over {self.blocks} blocks; '
                f'use steps {nearest}'
            )
        if self.steps > self.length:
            raise ValueError(
                f'sampling.steps {self.steps} exceeds sampling.length {self.length}, so some steps '
                f'would commit nothing; use at most {self.length} steps'
            )
        if not 0.0 <= self.temperature < float('inf'):
            raise ValueError(f'sampling.temperature is {self.temperature}; use 0 or more')
        if self.top_k < 0:
            raise ValueError(f'sampling.top_k is {self.top_k}; use 1 or more, or 0 for all ids')
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f'sampling.top_p is {self.top_p}; use a share above 0 and at most 1')
        for name in self.records:
            check_one_of('a record of the sampler', name, RECORDS)
        check_one_of('sampling.schedule', self.schedule, SCHEDULES)
        rule = self.rule
        self._check_rules()
        if 'influence' in self.records and not rule.even:
            raise ValueError(
                f'sampling.{self.rule_setting} {self.rule_name!r} does not commit evenly, which '
                'influence is measured by; use low_confidence, random, entropy, margin or '
                'left_to_right, or corruption.informed False'
            )
        self._check_cache()

    def _check_rules(self) -> None:
        """Refuses numbers of rules that no rule could use, whichever rule is chosen."""
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(
                f'sampling.threshold is {self.threshold}; use a probability above 0 and at most 1'
            )
        if not 0.0 < self.factor < float('inf'):
            raise ValueError(f'sampling.factor is {self.factor}; use a number above 0')
        if not 0.0 <= self.entropy_bound < float('inf'):
            raise ValueError(f'sampling.entropy_bound is {self.entropy_bound}; use 0 or more nats')
        if self.remasks < 0:
            raise ValueError(f'sampling.remasks is {self.remasks}; use 0 or more tokens of a block')
        for name in ('edit_threshold', 'keep_threshold'):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f'sampling.{name} is {getattr(self, name)}; use a probability within [0, 1]'
                )
        if self.post_steps < 0:
            raise ValueError(f'sampling.post_steps is {self.post_steps}; use 0 or more rounds')
        if self.edit_rounds < 1:
            raise ValueError(f'sampling.edit_rounds is {self.edit_rounds}; use 1 or more rounds')

    def _check_cache(self) -> None:
        """Refuses a cache that does not exist, or that cannot compute what is asked for."""
        check_one_of('sampling.cache', self.cache, CACHES)
        if self.refresh < 1:
            raise ValueError(f'sampling.refresh is {self.refresh}; use 1 or more steps')
        if self.cache and self.guidance:
            raise ValueError(
                f'sampling.cache {self.cache!r} holds one prompt, and sampling.guidance '
                f"{self.guidance} reads two; use sampling.cache '' or sampling.guidance 0"
            )
        if self.cache and 'influence' in self.records:
            raise ValueError(
                f'sampling.cache {self.cache!r} leaves out positions whose influence is measured; '
                "use sampling.cache '' or corruption.informed False"
            )
        if self.cache and self.edits:
            raise ValueError(
                f'sampling.cache {self.cache!r} holds keys and values of tokens that '
                f"sampling.{self.rule_setting} {self.rule_name!r} edits; use sampling.cache ''"
            )

    @property
    def rule_setting(self) -> str:
        """The setting that names the rule of commitment."""
        return 'sampler' if self.sampler else 'commit'

    @property
    def rule_name(self) -> str:
        return self.sampler or self.commit

    @property
    def rule(self) -> Sampler:
        """The rule of commitment; raises ValueError if there is none of its name.

        A sampler that edits a finished draft drafts by the rule of `commit`.
        """
        sampler = find(self.rule_name, f'sampling.{self.rule_setting}')
        if not sampler.edits_after:
            return sampler
        drafts = find(self.commit, 'sampling.commit')
        if drafts.edit is not None:
            raise ValueError(
                f'sampling.commit is {self.commit!r}, which edits, while a draft that is edited '
                f'needs a rule that does not; use sampling.sampler {self.rule_name!r} and '
                "sampling.commit 'low_confidence' or another"
            )
        return dataclasses.replace(drafts, edit=sampler.edit, edits_after=True)

    @property
    def edits(self) -> bool:
        """Whether tokens that are there may be written anew."""
        return self.rule.edit is not None

    @property
    def edits_in_blocks(self) -> bool:
        """Whether edits go along with the commitments of a block."""
        return self.edits and not self.rule.edits_after

    @property
    def rounds_per_block(self) -> int:
        """The most passes that a block takes: its steps, and those that only edit."""
        return self.steps_per_block + (self.post_steps if self.edits_in_blocks else 0)

    @property
    def edits_recorded(self) -> int:
        """R, the rounds whose edits of a position are recorded; 0 without edits."""
        if not self.edits:
            return 0
        return self.rounds_per_block if self.edits_in_blocks else self.edit_rounds

    @property
    def approximate(self) -> bool:
        """Whether logits are other than the model's, because some keys and values are old."""
        return bool(self.cache) and self.refresh > 1

    @property
    def blocks(self) -> int:
        return self.length // self.block_length

    @property
    def steps_per_block(self) -> int:
        return self.steps // self.blocks

    @property
    def positions_read(self) -> int:
        """How many positions a step unembeds: those of a block, and all that it may influence."""
        if 'influence' not in self.records:
            return self.block_length
        return min(self.block_length + self.influence_window, self.length)

    @property
    def exact_law(self) -> bool:
        """Whether the product of the recorded probabilities is the law of the completion.

        It is where positions are chosen without a look at the tokens drawn there: the law of the
        tokens, given the positions, is then the product. (Random positions are drawn apart.) With a
        cache the law is that of the approximate logits, which the tokens are drawn from.

        'low_confidence' ranks positions by the probability of the token that was *drawn*. Take two
        positions with probabilities (.7, .3) and (.6, .4), and one commit. The first position is
        committed exactly when it drew its likelier token. Given that it was chosen, its token is
        certain, while .7 is recorded. The second is committed with its likelier token with
        probability .3 x .6, while .6 is recorded: the .3 depends on the policy too, and is recorded
        nowhere. 'remask' also forgets the tokens that it takes back. Without noise, or where a step
        commits all that is left, nothing is chosen.

        Which tokens are edited never depends on those drawn. Where tokens are edited, the law is
        that of the draft and its edits together, and the product that of all their probabilities.
        """
        chooses = self.temperature > 0.0 and self.steps_per_block > 1
        return not self.rule.looks_at_tokens or not chooses
