"""Every command of `tests/reference/faults.jsonl` is refused as stated, but those of spg_jax.score.

Faults that need a scenario of their own name their test, or the test names them. These are tested
here:

| faults | test |
|---|---|
| F00 | runs/test_checkpoints.py: test_every_flipped_bit_is_noticed |
| F01 | runs/test_identity.py: test_a_finished_training_answers_only_to_its_own_settings |
| F06 | runs/test_checkpoints.py: test_a_damaged_newest_falls_back_and_is_set_aside |
| F42, F43 | test_launch.py: test_what_a_job_lacks_is_said_in_one_line |
| F56, F57, F58, F59 | test_fault_files.py: test_an_adapter_that_is_not_plain_is_refused |
| F60, F61 | runs/test_identity.py: test_other_contents_of_a_named_file_are_refused |
| F89 | process/test_files.py: test_a_path_that_the_locale_cannot_express_is_refused |
| G00 | process/test_lost_output.py: test_ctrl_c_on_a_pipeline_saves_though_the_reader_goes_first |
| G01 | process/test_lost_output.py: test_a_run_outlives_its_terminal_and_saves_at_a_later_sigterm |
| G03, G04, G06 | test_commands.py: test_a_name_that_nothing_could_be_read_from_is_refused |
| G08, G10 | process/test_lost_output.py: test_the_environment_changes_no_number |
| G11 | test_commands.py: test_a_tilde_is_the_home_directory |
| G12, G13 | test_commands.py: test_an_address_of_a_store_is_refused |
| G16 | process/test_files.py: test_data_that_is_there_is_read_without_a_lock |
| G18 | process/test_files.py: test_a_file_system_without_locks_stops_nothing |
| G19 | test_train.py: test_a_run_leaves_everything_it_promises |
| G27 | test_fault_files.py: test_a_template_is_rendered_without_its_byte_order_mark_… |
| G30 | test_score.py: test_importing_the_module_defines_no_flags |
| G31 | process/test_distributed.py: test_what_stops_one_process_stops_the_other_with_its_reason |
"""

import json
import re
import sys
from pathlib import Path

import pytest

from tests import forks
from tests.processes import REPOSITORY, environment, run

FAULTS = [json.loads(line) for line in (REPOSITORY / 'tests/reference/faults.jsonl').open()]
COMMANDS = {
    fault['id']: fault['case']
    for fault in FAULTS
    if fault.get('case', {}).get('command', {}).get('module', 'spg_jax.score') != 'spg_jax.score'
    and fault['case']['expect'] == 'refused'
}
PLAN = 'F39'  # No other test starts spg_jax.plan as users do.


def test_every_fault_that_needs_a_scenario_has_a_test():
    files = (REPOSITORY / 'tests').rglob('*.py')
    names = set(re.findall(r'\b[FG][0-9]{2}\b', ''.join(file.read_text() for file in files)))
    assert {fault['id'] for fault in FAULTS if 'case' not in fault} <= names


def test_the_tests_of_the_table_exist():
    rows = re.findall(r'^\| [FG][0-9, FG]+ \| (\S+): (test_\w+)(…?) \|$', __doc__, re.MULTILINE)
    assert len(rows) == len(re.findall(r'^\| [FG][0-9]', __doc__, re.MULTILINE))
    for file, name, cut in rows:
        content = (REPOSITORY / 'tests' / file).read_text()
        assert f'def {name}' + ('' if cut else '(') in content, name


def lay_out(fault: str, directory: Path) -> None:
    """Makes the directory that a command starts in."""
    (directory / 'configs').symlink_to(REPOSITORY / 'configs')
    for name, content in COMMANDS[fault]['command']['files'].items():
        (directory / name).write_text(content)


@pytest.fixture(scope='module')
def ended_together(tmp_path_factory):
    """What commands leave in the usual environment, which one process runs one after the other;
    each with its directory, by fault."""
    directories = {
        fault: tmp_path_factory.mktemp(fault)
        for fault, case in COMMANDS.items()
        if not case['command']['env'] and fault != PLAN
    }
    commands = []
    for fault, directory in directories.items():
        lay_out(fault, directory)
        command = COMMANDS[fault]['command']
        commands.append((command['module'], directory, command['argv']))
    left = forks.run_all(commands)
    return dict(zip(directories, zip(directories.values(), left, strict=True), strict=True))


@pytest.mark.parametrize('fault', COMMANDS)
def test_a_command_is_refused_as_stated(fault: str, tmp_path: Path, ended_together: dict):
    """A command that needs its own environment gets its own process, and so does PLAN."""
    if fault in ended_together:
        directory, (code, _, error) = ended_together[fault]
    else:
        directory, command = tmp_path, COMMANDS[fault]['command']
        lay_out(fault, directory)
        words = [sys.executable, '-m', command['module'], *command['argv']]
        ended = run(words, cwd=directory, env=environment(**command['env']))
        code, error = ended.returncode, ended.stderr
    assert 'Traceback' not in error
    assert code == 1
    assert error.startswith('error: ') and error.count('\n') == 1
    assert not (directory / 'runs').exists() and not (directory / 'data').exists()
