"""Processes of one job meet whatever proxy leads to the internet."""

import pytest

from tests.processes import finish_all, start_pair

pytestmark = pytest.mark.fast


def test_processes_meet_though_a_proxy_is_set():
    """Fault G31. Nothing listens at the proxy. Both processes get as far as a setting that cannot
    work, which they read after they have met."""
    proxies = {name: 'http://127.0.0.1:9' for name in ('http_proxy', 'https_proxy', 'grpc_proxy')}
    pair = start_pair(
        *('spg_jax.train', '--distributed', '--config=countdown:tiny'),
        '--config.rl.microbatch=7',
        **proxies,
    )
    for code, _, error in finish_all(pair):
        assert code == 1 and 'rl.microbatch 7' in error and 'proxy' not in error
