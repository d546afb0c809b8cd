"""The launchers run for real against stand-ins of gcloud, systemd and Slurm in `stand_ins/`.

The stand-ins do what the documentation of the real commands says and nothing else. They know a
slice of two workers whose homes are directories, a service whose process gets SIGTERM, and a batch
job with two tasks.
"""

import contextlib
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import finish, run, start, wait_until

ROOT = Path(__file__).parents[1]
STAND_INS = ROOT / 'tests' / 'stand_ins'
SCRIPTS = sorted((ROOT / 'launch').glob('*.sh'))
CONFIG = '--config=configs/countdown.py:llada_8b_v5e16'
TRAP = 'nodes[$(touch trapped)]'  # shell arithmetic would run the command in it
AWKWARD = [
    '--config.a=it\'s "so"',
    '--config.b=costs $5 or $HOME',
    '--config.c=two\nlines; exit 1 &',
]


class Cloud:
    """What the stand-ins share: the state of a slice, and a log of all commands they received."""

    def __init__(self, directory: Path, source: Path) -> None:
        self.directory = directory
        self.source = source
        self.mount = directory / 'shared'
        self.workdir = self.mount / 'runs' / 'one'
        self.environment = {
            'PATH': f'{STAND_INS}:{os.environ["PATH"]}',
            'HOME': str(directory),
            'TMPDIR': str(directory),
            'CLOUD': str(directory),
            'ZONE': 'us-west4-a',
            'TPU_NAME': 'my-tpu',
            'PROJECT': 'my-project',
        }

    def plot(self, *ends: str) -> None:
        (self.directory / 'plot').write_text('\n'.join(ends) + '\n')

    def shell(self, script: str, *words: str, **options) -> subprocess.CompletedProcess:
        return run(
            [ROOT / 'launch' / script, *words],
            env=self.environment,
            **({'stdin': subprocess.DEVNULL} | options),
        )

    def tpu(self, command: str, *words: str, **options) -> subprocess.CompletedProcess:
        flags = words[: words.index('--')] if '--' in words else words
        return self.shell(
            'tpu.sh',
            command,
            '--accelerator-type=v5litepod-16',
            '--bucket=my-bucket',
            f'--mount={self.mount}',
            f'--workdir={self.workdir}',
            f'--source={self.source}',
            '--poll=0.05',
            *flags,
            *words[len(flags) :],
            **options,
        )

    def log(self, program: str) -> list[list[str]]:
        path = self.directory / 'log'
        lines = path.read_text().split('\x1e')[:-1] if path.exists() else []
        commands = [line.split('\x1f')[:-1] for line in lines]
        return [command for command in commands if command[0] == program]

    def story(self) -> list[str]:
        """The commands that changed the slice, without those that only looked at it."""
        told = []
        for command in self.log('gcloud'):
            told += [verb for verb in ('create', 'delete', 'scp') if verb in command]
            told += [
                act for act in ('install', 'start', 'stop') if f'tpu_worker.sh {act}' in command[-1]
            ]
        return told

    def arguments(self, worker: int) -> tuple[str, list[str]]:
        """The directory in which the training of a worker ran, and its arguments."""
        place, _, words = (self.directory / f'arguments-{worker}').read_text().partition('\n')
        return place, words.split('\0')[:-1]

    def set(self, node: str, queue: str) -> None:
        for name, state in (('node', node), ('queue', queue)):
            (self.directory / name).write_text(f'{state}\n' if state else '')


@pytest.fixture(scope='module')
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git checkout that contains the launchers."""
    source = tmp_path_factory.mktemp('checkout')
    shutil.copytree(ROOT / 'launch', source / 'launch')
    identity = '-c user.name=t -c user.email=t@t'
    for step in ('init --quiet', 'add --all', 'commit --quiet --message=all'):
        run(f'git {identity} {step}'.split(), cwd=source).check_returncode()
    return source


@pytest.fixture
def cloud(tmp_path: Path, checkout: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path, checkout)
    yield made
    for path in tmp_path.glob('worker-*/unit.pid'):
        with contextlib.suppress(ProcessLookupError):  # most have ended
            os.kill(int(path.read_text()), signal.SIGKILL)


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name('shellcheck')
    found = run([shellcheck, '--external-sources', *SCRIPTS, *STAND_INS.iterdir()])
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_slice_from_nothing_to_a_saved_run_and_gone(cloud):
    cloud.plot('run')
    cloud.source = shutil.copytree(cloud.source, cloud.directory / 'checkout')
    (cloud.source / 'launch' / 'notes').write_text('not tracked')
    (cloud.source / 'launch' / 'common.sh').write_text('changed')
    assert cloud.tpu('status').stdout == 'slice my-tpu: absent\n'
    created = cloud.tpu('create', '--yes', '--spot', '--create-flag=--labels=team=my team')
    assert created.returncode == 0, created.stderr
    assert 'v5litepod-16 = 16 chips, spot, in us-west4-a' in created.stderr
    assert 'project my-project' in created.stderr
    assert [c for c in cloud.log('gcloud') if 'create' in c] == [
        shlex.split(
            'gcloud compute tpus queued-resources create my-tpu --zone=us-west4-a --node-id=my-tpu '
            '--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot '
            "'--labels=team=my team'"
        )
    ]
    assert cloud.tpu('status').stdout == 'slice my-tpu: ready\nrun: missing\n'

    installed = cloud.tpu('install')
    assert installed.returncode == 0, installed.stderr
    for worker in (0, 1):
        home = cloud.directory / f'worker-{worker}'
        assert (home / 'spg-jax' / 'launch' / 'common.sh').read_text() == 'changed'
        assert not (home / 'spg-jax' / 'launch' / 'notes').exists()
        kind, where, what = (home / 'fstab').read_text().split()[:3]
        assert (kind, where, what) == ('my-bucket', str(cloud.mount), 'gcsfuse')
        place = f'python3 in {home}/spg-jax'
        assert [c[1:4] for c in cloud.log(place)] == [['-m', 'uv', 'pip']]
        assert cloud.log(place)[0][-2:] == ['--editable', '.[tpu,hf]']
    assert not list(cloud.directory.glob('tmp.*')), 'the archive is left behind'

    started = cloud.tpu('start', '--', CONFIG, *AWKWARD)
    assert started.returncode == 0, started.stderr
    wait_until((cloud.directory / 'arguments-1').exists)
    for worker in (0, 1):
        place, words = cloud.arguments(worker)
        assert place == f'{cloud.directory}/worker-{worker}/spg-jax'
        train = ['-m', 'spg_jax.train', '--distributed', f'--workdir={cloud.workdir}']
        assert words == [*train, CONFIG, *AWKWARD]
    service = [c for c in cloud.log('sudo') if c[1] == 'systemd-run'][0]
    assert f'--property=RequiresMountsFor={cloud.mount}' in service
    assert cloud.tpu('status').stdout.endswith('run: active\n')
    assert 'training on 1' in cloud.tpu('logs', '--worker=1').stdout
    again = cloud.tpu('install')
    assert again.returncode != 0 and 'a run is active; launch/tpu.sh stop first' in again.stderr

    assert cloud.tpu('stop').returncode == 0
    assert (cloud.workdir / 'saved-0').exists() and (cloud.workdir / 'saved-1').exists()
    assert cloud.tpu('status').stdout.endswith('run: inactive\n')
    assert cloud.tpu('stop').returncode == 0  # nothing to do
    deleted = cloud.tpu('delete', '--yes')
    assert deleted.returncode == 0, deleted.stderr
    assert cloud.log('gcloud')[-1][3:] == shlex.split(
        'queued-resources delete my-tpu --zone=us-west4-a --force --quiet'
    )


@pytest.mark.parametrize('command', ['create', 'install', 'start', 'stop', 'delete', 'watch'])
def test_a_dry_run_prints_what_a_run_does_and_does_nothing(cloud, command):
    cloud.plot('finished')
    words = ('--yes', '--delete-after', '--project=p', '--', CONFIG, *AWKWARD)
    dry = cloud.tpu(command, *words[:3], '--dry-run', *words[3:])
    assert dry.returncode == 0, dry.stderr
    assert not (cloud.directory / 'log').exists()
    if command not in ('create', 'watch'):
        assert cloud.tpu('create', '--yes', '--project=p').returncode == 0
    if command in ('start', 'stop'):
        assert cloud.tpu('install', '--project=p').returncode == 0
    (cloud.directory / 'log').unlink(missing_ok=True)
    wet = cloud.tpu(command, *words)
    assert wet.returncode == 0, wet.stderr

    def acts(commands: list[list[str]]) -> list[list[str]]:
        looks = ('list',) if command == 'watch' else ()
        kept = [c for c in commands if c[0] == 'gcloud' and c[4] not in looks]
        return [c for c in kept if command != 'watch' or 'tpu_worker.sh state' not in c[-1]]

    assert len(dry.stdout.splitlines()) > 0
    printed = [shlex.split(line) for line in _one_command_a_line(dry.stdout)]
    assert acts(_without_folders(printed)) == acts(_without_folders(cloud.log('gcloud')))


def _without_folders(commands: list[list[str]]) -> list[list[str]]:
    """The commands without the names of temporary folders, which nobody can guess."""
    return [[re.sub(r'/tmp\.\w+/', '/', word) for word in command] for command in commands]


def test_the_archive_lies_where_only_its_owner_writes(cloud):
    """The name that other users could guess today is a link to a file of the user."""
    assert cloud.tpu('create', '--yes').returncode == 0
    victim = cloud.directory / 'victim'
    victim.write_text('kept')
    (cloud.directory / 'spg-jax-my-tpu.tar.gz').symlink_to(victim)
    installed = cloud.tpu('install')
    assert installed.returncode == 0, installed.stderr
    assert victim.read_text() == 'kept'
    copied = [c for c in cloud.log('gcloud') if 'scp' in c][0][5]
    assert re.fullmatch(rf'{cloud.directory}/tmp\.\w+/spg-jax.tar.gz', copied)


def _one_command_a_line(text: str) -> list[str]:
    """Lines as bash reads them. $'…', which shlex does not know, becomes plain quotes."""
    words = run(
        ['bash', '-c', 'while IFS= read -r line; do eval "w=($line)"; printf "%s\\0" "${w[@]}"; '
         'printf "\\1\\0"; done'],
        input=text,
    ).stdout.split('\1\0')  # fmt: skip
    return [shlex.join(command.split('\0')[:-1]) for command in words if command]


def test_watch_recreates_after_preemption_and_goes_on_until_finished(cloud):
    cloud.plot('preempted', 'finished')
    watched = cloud.tpu('watch', '--yes', '--spot', '--delete-after', '--', CONFIG)
    assert watched.returncode == 0, watched.stderr
    life = ['create', 'scp', 'install', 'start', 'delete']
    assert cloud.story() == life + life
    creations = [c for c in cloud.log('gcloud') if 'create' in c]
    assert creations[0] == creations[1]
    assert (cloud.workdir / 'saved-0').exists() and (cloud.workdir / 'result.json').exists()
    for seen in ('absent', 'missing', 'lost', 'finished'):
        assert f'my-tpu: {seen}\n' in watched.stderr


def test_watch_of_a_finished_run_starts_nothing_and_leaves_the_slice(cloud):
    assert cloud.tpu('create', '--yes').returncode == 0
    assert cloud.tpu('install').returncode == 0
    cloud.workdir.mkdir(parents=True)
    (cloud.workdir / 'result.json').write_text('{}')
    watched = cloud.tpu('watch', '--yes', '--', CONFIG)
    assert watched.returncode == 0
    assert 'billed until launch/tpu.sh delete' in watched.stderr
    assert cloud.story() == ['create', 'scp', 'install']


def test_watch_starts_again_what_was_saved_and_gives_up_on_what_keeps_failing(cloud):
    cloud.plot('interrupted', *['failed'] * 3)
    watched = cloud.tpu('watch', '--yes', '--retries=2', '--', CONFIG)
    assert watched.returncode == 2
    assert 'failed 3 times' in watched.stderr.splitlines()[-1]
    assert cloud.story().count('create') == 1 and cloud.story().count('delete') == 0
    assert [word for word in cloud.story() if word in ('start', 'stop')] == [
        *['start', 'start'],
        *['stop', 'start'] * 2,
    ]
    assert (cloud.directory / 'starts-1').read_text() == 'start\n' * 4


def test_a_request_that_fails_ends_create_and_after_the_retries_watch(cloud):
    (cloud.directory / 'unlucky').touch()
    created = cloud.tpu('create', '--yes')
    assert created.returncode == 2
    assert 'queued-resources describe my-tpu --zone=us-west4-a' in created.stderr
    assert cloud.tpu('delete', '--yes').returncode == 0
    (cloud.directory / 'log').unlink()
    watched = cloud.tpu('watch', '--yes', '--retries=1', '--', CONFIG)
    assert watched.returncode == 2
    assert cloud.story() == ['create', 'delete', 'create']


@pytest.mark.parametrize(
    ('node', 'queue', 'state'),
    [
        ('', '', 'absent'),
        ('', 'WAITING_FOR_RESOURCES', 'waiting'),
        ('CREATING', 'PROVISIONING', 'waiting'),
        ('REPAIRING', 'ACTIVE', 'waiting'),
        ('READY', 'SUSPENDING', 'waiting'),
        ('PREEMPTED', 'SUSPENDING', 'waiting'),
        ('PREEMPTED', 'ACTIVE', 'lost'),
        ('', 'SUSPENDED', 'lost'),
        ('', 'FAILED', 'lost'),
        ('PREEMPTED', '', 'lost'),  # made without a request
    ],
)
def test_states_of_a_slice(cloud, node, queue, state):
    cloud.set(node, queue)
    assert cloud.tpu('status').stdout == f'slice my-tpu: {state}\n'


@pytest.mark.parametrize('command', ['create', 'install', 'status'])
def test_a_command_that_gcloud_refuses_ends_all_with_its_message(cloud, command):
    refused = {'create': 'queued-resources create', 'install': 'scp', 'status': 'tpu-vm list'}
    if command == 'install':
        assert cloud.tpu('create', '--yes').returncode == 0
    (cloud.directory / 'refuse').write_text(refused[command])
    failed = cloud.tpu(command, '--yes')
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == 'ERROR: (gcloud) quota exceeded in us-west4-a'
    assert refused[command] in ' '.join(cloud.log('gcloud')[-1])


def test_watch_outlives_answers_that_do_not_come_but_not_five_in_a_row(cloud):
    (cloud.directory / 'refuse').write_text('tpu-vm list')
    failed = cloud.tpu('watch', '--yes', '--', CONFIG)
    assert failed.returncode == 2
    assert failed.stderr.count('quota exceeded') == 5
    assert 'my-tpu may still be billed' in failed.stderr.splitlines()[-1]


def test_nothing_is_created_or_deleted_unasked(cloud):
    for command in ('create', 'watch', 'delete'):
        unasked = cloud.tpu(command, '--', CONFIG)
        assert unasked.returncode == 2
        assert 'add --yes' in unasked.stderr.splitlines()[-1]
    for answer, status in ((b'n\n', 2), (b'y\n', 0)):
        terminal, end = pty.openpty()
        os.write(terminal, answer)
        assert cloud.tpu('create', stdin=end).returncode == status
        os.close(end)
        os.close(terminal)
        assert len(cloud.story()) == (answer == b'y\n')


def test_a_slice_made_without_a_request_is_used_and_deleted(cloud):
    cloud.set('READY', '')
    used = cloud.tpu('create')
    assert used.returncode == 0 and 'exists, so it is used' in used.stderr
    assert cloud.tpu('delete', '--yes').returncode == 0
    expected = shlex.split('gcloud compute tpus tpu-vm delete my-tpu --zone=us-west4-a --quiet')
    assert cloud.log('gcloud')[-1] == expected


def test_workers_can_clone_a_repository(cloud):
    assert cloud.tpu('create', '--yes').returncode == 0
    installed = cloud.tpu('install', f'--repo={cloud.source}', '--ref=HEAD~0')
    assert installed.returncode == 0, installed.stderr
    assert (cloud.directory / 'worker-1' / 'spg-jax' / '.git').is_dir()
    assert 'scp' not in cloud.story()


def test_a_run_does_not_start_beside_the_shared_file_system(cloud):
    cloud.plot('run')
    assert cloud.tpu('create', '--yes').returncode == 0
    assert cloud.tpu('install').returncode == 0
    (cloud.directory / 'worker-1' / 'mounts').unlink()
    started = cloud.tpu('start', '--', CONFIG)
    assert started.returncode == 1
    assert f'nothing is mounted at {cloud.mount}; run tpu.sh install' in started.stderr


@pytest.mark.parametrize(
    ('command', 'words', 'said'),
    [
        ('', [], "'' is not a command; see launch/tpu.sh --help"),
        ('launch', [], "'launch' is not a command; see launch/tpu.sh --help"),
        ('create', ['--zone='], 'no --zone given; add --zone=VALUE (--help)'),
        ('create', ['--name='], 'no --name given; add --name=VALUE (--help)'),
        (
            'create',
            ['--accelerator-type='],
            'no --accelerator-type given; add --accelerator-type=VALUE (--help)',
        ),
        (
            'create',
            ['--accelerator-type=a100'],
            'unknown --accelerator-type=a100; expected such as v5litepod-16, v6e-8, v5p-8',
        ),
        ('create', ['--sopt'], "unknown setting '--sopt'; see launch/tpu.sh --help"),
        ('install', ['--nfs=a:/b'], 'both --bucket=my-bucket and --nfs=a:/b given; choose one'),
        (
            'start',
            ['--workdir=/home/one'],
            '--workdir=/home/one is not under --mount=/shared, the file system all workers share',
        ),
        ('start', [], 'no --config after --; add -- --config=configs/TASK.py:PRESET'),
        (
            'create',
            ['--accelerator-type=v4-08'],
            'unknown --accelerator-type=v4-08; expected such as v5litepod-16, v6e-8, v5p-8',
        ),
        ('watch', ['--retries=many'], "--retries is 'many'; give an integer of at least 0"),
        ('watch', [f'--retries={TRAP}'], f"--retries is '{TRAP}'; give an integer of at least 0"),
        ('watch', ['--poll=soon'], "--poll is 'soon'; give a number of seconds"),
        ('start', ['--', CONFIG, '--workdir=/b'], '--workdir found after --; give it before'),
        (
            'watch',
            ['--workdir=', '--', CONFIG],
            'no --workdir given; add --workdir=DIR, a path all machines share',
        ),
    ],
)
def test_what_is_missing_or_wrong_is_said_in_one_line(cloud, command, words, said):
    cloud.mount, cloud.workdir = Path('/shared'), Path('/shared/one')
    failed = cloud.tpu(command, *words)
    assert failed.returncode == 2
    assert failed.stderr == f'tpu.sh: {said}\n'
    assert not cloud.log('gcloud') or command == 'create'


@pytest.mark.parametrize(
    ('kind', 'chips', 'image'),
    [
        ('v5litepod-8', 8, 'v2-alpha-tpuv5-lite'),
        ('v6e-8', 8, 'v2-alpha-tpuv6e'),
        ('v5p-16', 8, 'v2-alpha-tpuv5'),
        ('v4-8', 4, 'tpu-ubuntu2204-base'),
    ],
)
def test_chips_and_images_of_accelerator_types(cloud, kind, chips, image):
    shown = cloud.tpu('create', f'--accelerator-type={kind}', '--dry-run')
    assert f'{kind} = {chips} chips, on demand' in shown.stderr
    assert f'--runtime-version={image}' in shown.stdout


def test_help_is_the_head_of_the_script(cloud):
    for script in ('tpu.sh', 'slurm.sh'):
        shown = cloud.shell(script, '--help')
        assert shown.returncode == 0
        assert '--dry-run' in shown.stdout and 'set -e' not in shown.stdout


# --- Slurm ----------------------------------------------------------------------------------------


@pytest.fixture
def venv(cloud: Cloud) -> Path:
    path = cloud.directory / 'an environment'
    (path / 'bin').mkdir(parents=True)
    (path / 'bin' / 'python').symlink_to(STAND_INS / 'training')
    return path


def _job(cloud: Cloud) -> subprocess.Popen:
    return start(
        ['bash', cloud.directory / 'job.sh'],
        stderr=subprocess.STDOUT,
        env=cloud.environment | {'SLURM_JOB_ID': '7'},
    )


def test_a_job_told_to_end_saves_and_goes_back_until_it_is_finished(cloud, venv):
    cloud.plot('run', 'finished')
    words = [f'--workdir={cloud.workdir}', f'--venv={venv}', '--nodes=2', '--partition=gpu']
    submitted = cloud.shell('slurm.sh', *words, '--', CONFIG, *AWKWARD)
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.startswith('job 7\n')
    options = cloud.log('sbatch')[0]
    for option in ('--nodes=2', '--ntasks-per-node=1', '--gpus-per-node=8', '--requeue'):
        assert option in options
    assert '--signal=TERM@600' in options and options[-1] == '--partition=gpu'

    job = _job(cloud)
    wait_until(
        lambda: all((cloud.directory / f'arguments-{rank}').exists() for rank in (0, 1)), job
    )
    for rank in (0, 1):
        place, given = cloud.arguments(rank)
        assert place == str(ROOT)
        train = ['-m', 'spg_jax.train', '--distributed', f'--workdir={cloud.workdir}']
        assert given == [*train, CONFIG, *AWKWARD]
    os.kill(job.pid, signal.SIGTERM)  # the script itself may get it, too
    for rank in (0, 1):
        os.kill(int((cloud.directory / f'process-{rank}').read_text()), signal.SIGTERM)
    code, said, _ = finish(job)
    assert code == 0, said
    assert (cloud.workdir / 'saved-0').exists() and (cloud.workdir / 'saved-1').exists()
    assert cloud.log('scontrol') == [['scontrol', 'requeue', '7']]

    job = _job(cloud)
    code, said, _ = finish(job)
    assert code == 0 and (cloud.workdir / 'result.json').exists(), said
    assert len(cloud.log('scontrol')) == 1


def test_a_job_that_fails_is_not_requeued(cloud, venv):
    cloud.plot('failed')
    words = (f'--workdir={cloud.workdir}', f'--venv={venv}')
    assert cloud.shell('slurm.sh', *words, '--', CONFIG).returncode == 0
    job = _job(cloud)
    assert finish(job)[0] == 1
    assert cloud.log('scontrol') == []


@pytest.mark.parametrize('way', ['--apptainer', '--container-image'])
def test_a_container_sees_the_code_the_run_and_what_is_bound(cloud, way):
    cloud.plot('finished')
    image = cloud.directory / 'an image.sif'
    image.touch()
    words = (f'--workdir={cloud.workdir}', f'{way}={image}', '--bind=/data', '--gpus-per-node=4')
    assert cloud.shell('slurm.sh', *words, '--', CONFIG).returncode == 0
    job = _job(cloud)
    code, said, _ = finish(job)
    assert code == 0, said
    assert cloud.arguments(1)[1][:2] == ['-m', 'spg_jax.train']
    step = cloud.log('srun')[0]
    seen = [str(ROOT), str(cloud.workdir), '/data']
    if way == '--apptainer':
        bound = [word for flag in seen for word in ('--bind', flag)]
        start = step.index('apptainer')
        assert step[start : start + 11] == [
            *['apptainer', 'exec', '--nv'],
            *bound,
            str(image),
            'python3',
        ]
    else:
        assert f'--container-image={image}' in step and f'--container-workdir={ROOT}' in step
        assert f'--container-mounts={",".join(f"{path}:{path}" for path in seen)}' in step
    assert 'JAX_LOCAL_DEVICE_IDS=0,1,2,3\n' in (cloud.directory / 'job.sh').read_text()


def test_a_dry_submission_can_be_pasted_into_a_shell(cloud, venv):
    words = (f'--workdir={cloud.workdir}', f'--venv={venv}', '--comment=two words')
    shown = cloud.shell('slurm.sh', *words, '--dry-run', '--', CONFIG, *AWKWARD)
    assert shown.returncode == 0 and not cloud.log('sbatch') and not cloud.workdir.exists()
    assert cloud.shell('slurm.sh', *words, '--', CONFIG, *AWKWARD).returncode == 0
    script = (cloud.directory / 'job.sh').read_text()
    run(['bash', '-c', shown.stdout], env=cloud.environment).check_returncode()
    assert cloud.log('sbatch')[0] == cloud.log('sbatch')[1]
    assert (cloud.directory / 'job.sh').read_text() == script


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        ([], 'no --workdir given; add --workdir=DIR, a path all machines share'),
        (['--workdir=a'], '--workdir=a is relative; give a path all machines share'),
        (['--workdir=/a'], 'no --config after --; add -- --config=configs/TASK.py:PRESET'),
        (
            ['--workdir=/a', '--', CONFIG],
            '0 of --venv, --apptainer and --container-image given; give one',
        ),
        (
            ['--workdir=/a', '--venv=/none', '--', CONFIG],
            '/none/bin/python not found; see launch/README.md',
        ),
        (
            ['--workdir=/a', '-p', 'gpu', '--', CONFIG],
            "'gpu' is no option; give sbatch options as --name=value, training flags after --",
        ),
        *(  # faults F42 and F43: what shell arithmetic would take for a variable or run
            ([f'--{name}={value}'], f"--{name} is '{value}'; give a positive integer")
            for name in ('nodes', 'gpus-per-node', 'save-seconds')
            for value in ('abc', '0', '-1', '08', '1.5', '', '9999999', TRAP)
        ),
    ],
)
def test_what_a_job_lacks_is_said_in_one_line(cloud, words, said):
    failed = cloud.shell('slurm.sh', *words, cwd=cloud.directory)
    assert (failed.returncode, failed.stderr) == (2, f'slurm.sh: {said}\n')
    assert not cloud.log('sbatch') and not (cloud.directory / 'trapped').exists()
