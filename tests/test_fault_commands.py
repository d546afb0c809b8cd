"""Every command of `tests/reference/faults.jsonl` but those of spg_jax.score gives what is stated.

Faults of the surroundings and of commands that need a scenario of their own are tested here:

| faults | test |
|---|---|
| F42, F43 | test_launch.py: test_what_a_job_lacks_is_said_in_one_line |
| G00 | process/test_lost_output.py: test_ctrl_c_on_a_pipeline_saves_though_the_reader_goes_first |
| G01 | process/test_lost_output.py: test_a_run_outlives_its_terminal_and_saves_at_a_later_sigterm |
| G03, G04, G06 | test_commands.py: test_a_name_that_nothing_could_be_read_from_is_refused |
| G08, G10 | process/test_lost_output.py: test_the_environment_changes_no_number |
| G11 | test_commands.py: test_a_tilde_is_the_home_directory |
| G12, G13 | test_commands.py: test_an_address_of_a_store_is_refused |
| G16 | process/test_files.py: test_data_that_is_there_is_read_without_a_lock |
| G18 | process/test_files.py: test_a_file_system_without_locks_stops_nothing |
| G31 | process/test_proxy.py: test_processes_meet_though_a_proxy_is_set |
"""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.processes import REPOSITORY, run, share_with_runs_in

FAULTS = [json.loads(line) for line in (REPOSITORY / 'tests/reference/faults.jsonl').open()]
COMMANDS = {
    fault['id']: fault['case']
    for fault in FAULTS
    if fault.get('case', {}).get('command', {}).get('module', 'spg_jax.score') != 'spg_jax.score'
}


@pytest.mark.compiled_as_users_do
@pytest.mark.parametrize('fault', COMMANDS)
def test_a_command_gives_what_is_stated(fault: str, tmp_path: Path):
    case, command = COMMANDS[fault], COMMANDS[fault]['command']
    (tmp_path / 'configs').symlink_to(REPOSITORY / 'configs')
    if case['expect'] == 'runs':
        share_with_runs_in(tmp_path)
    for name, content in command['files'].items():
        (tmp_path / name).write_text(content)
    ended = run(
        [sys.executable, '-m', command['module'], *command['argv']],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(REPOSITORY)} | command['env'],
    )
    assert 'Traceback' not in ended.stderr
    if case['expect'] == 'refused':
        assert ended.returncode == 1
        assert ended.stderr.startswith('error: ') and ended.stderr.count('\n') == 1
        assert not (tmp_path / 'runs').exists() and not (tmp_path / 'data').exists()
    else:
        assert case['expect'] == 'runs'
        assert ended.returncode == 0, ended.stderr
        assert (tmp_path / 'w' / 'curves.png').stat().st_size > 0
