"""infra/slurm on a real Slurm: slurmctld, two slurmd and munged of this test on this machine."""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT, Project, kill_everything, make_project, wait_until
from tests.end_to_end.test_killed import last_checkpoint, weights

SCRIPTS = ROOT / "infra/slurm"
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "squeue", "scancel", "srun")
SEARCH_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in NEEDED if shutil.which(name, path=SEARCH_PATH) is None]
needs_slurm = pytest.mark.skipif(
    bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install --no-install-recommends slurm-wlm munge"
)
SIZES = ("--nodes", "--gpus", "--cpus")
"""Options of the README's commands that are too large for this Slurm."""
FAST = {"REDIFFUSE_JOIN_SECONDS": "120"}


@dataclass
class Slurm:
    """Two nodes, n1 and n2, of one CPU each, on this machine."""

    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "MLFLOW_", "REDIFFUSE_", "SLURM", "SBATCH_", "PYTEST"))
        }
        return {
            **kept,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{SEARCH_PATH}",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        user, host = getpass.getuser(), socket.gethostname().split(".")[0]
        ports = free_ports(3)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\nIgnoreSystemd=yes\n")
        nodes = "".join(
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1000\n"
            for number, port in ((1, ports[1]), (2, ports[2]))
        )
        (self.folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={self.folder}/munge.socket,cred_expire=5
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool-%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/none
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
FirstJobId={1000 + os.getpid() * 20}
ReturnToService=2
KillWait=30
{nodes}PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
""")
        munge = ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={key}"]
        munge += [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed") if name != "log"] + [
            f"--log-file={self.folder}/munge.log"
        ]
        self._start(*munge)
        wait_until((self.folder / "munge.socket").exists, 20, "munged")
        self._start("slurmctld", "-D")
        for name in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", name)
        wait_until(
            lambda: self.run("sinfo", "-h", "-o", "%T:%D", check=False).strip() == "idle:2", 60, "two idle nodes"
        )

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as log:
            self.daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            )

    def stop(self) -> None:
        self.run("scancel", "--user", getpass.getuser(), check=False)
        deadline = time.monotonic() + 45
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.5)
        own = str(self.folder)
        for process in psutil.process_iter():
            try:
                if own in process.environ().get("SLURM_CONF", "") and process.pid != os.getpid():
                    process.kill()
            except psutil.Error:
                continue
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait(30)

    def run(self, *command: str, cwd: Path | None = None, check: bool = True, **more: str) -> str:
        result = subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or result.returncode == 0, f"{' '.join(command)}: {result.stdout}"
        return result.stdout

    def submit(self, project: Project, script: str, *arguments: str, options: tuple[str, ...] = (), **more: str) -> str:
        """Submit a script of infra/slurm as its README says and return the job's number."""
        text = self.run(
            "sbatch",
            "--parsable",
            "--cpus-per-task=1",
            *options,
            f"infra/slurm/{script}",
            *arguments,
            cwd=project.folder,
            **FAST,
            **more,
        )
        return text.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what `scontrol show job` says."""
        text = self.run("scontrol", "show", "job", number, "--oneliner", check=False)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, number: str, seconds: float, project: Project, output: str | None = None) -> str:
        """Wait until the job has ended, release a requeued one from its delay, and return its output."""
        path = project.folder / (output or f"slurm-{number}.out")
        deadline = time.monotonic() + seconds
        while self.job(number).get("JobState") in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            if time.monotonic() > deadline:
                logs = "".join(each.read_text()[-1500:] for each in project.folder.glob("runs/slurm/*/ray-*.log"))
                raise AssertionError(f"job {number} still runs: {self.job(number)}\n{path.read_text()[-3000:]}\n{logs}")
            time.sleep(0.5)
        return path.read_text()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds sockets
    made = Slurm(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def trained(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, str, str]]:
    """A project that one job has trained on two nodes without a stop; the job's number and its output."""
    made = make_project(
        tmp_path_factory.mktemp("slurm") / "project",
        run={"train": {"checkpoint_every": 4}},
        train__steps=60,
        tune__enabled=False,
    )
    shutil.copytree(ROOT / "infra", made.folder / "infra")
    made.commit()
    number = slurm.submit(made, "repro.sbatch", "train")
    yield made, number, slurm.wait(number, 400, made)
    kill_everything(made)


def left_behind(number: str) -> list[str]:
    """Return the folders and processes of a job on this machine."""
    folder = f"/tmp/rediffuse-{number}-"
    found = [str(path) for path in Path("/tmp").glob(f"rediffuse-{number}-*")]
    for process in psutil.process_iter():
        try:
            if any(folder in argument for argument in process.cmdline()):
                found.append(" ".join(process.cmdline())[:120])
        except psutil.Error:
            continue
    return found


@needs_slurm
@pytest.mark.infra
@pytest.mark.timeout(900)
def test_training_runs_on_both_nodes_of_an_allocation(slurm: Slurm, trained: tuple[Project, str, str]) -> None:
    project, number, text = trained
    assert "done: exit status 0" in text, text[-6000:]
    assert "all 2 node(s) have joined Ray: n1 (1 CPUs, 0 GPUs), n2 (1 CPUs, 0 GPUs)" in text
    assert "2 workers with 1 CPU each: one per node" in text
    assert slurm.job(number)["JobState"] == "COMPLETED"
    assert left_behind(number) == []
    assert not (project.folder / "runs/slurm" / number / "token").exists()


@needs_slurm
@pytest.mark.infra
@pytest.mark.timeout(900)
def test_signalled_pipeline_is_requeued_and_ends_with_the_same_weights(
    slurm: Slurm, trained: tuple[Project, str, str], tmp_path: Path
) -> None:
    expected = weights(trained[0])
    copy = tmp_path / "copy"
    shutil.copytree(trained[0].folder, copy, symlinks=True)
    for result in ("artifacts/model", "runs/train", "runs/slurm", ".dvc/cache/runs"):
        shutil.rmtree(copy / result)
    project = Project(copy)
    lock = YAML(typ="safe").load(copy / "dvc.lock")
    del lock["stages"]["train"]  # DVC would take the model from its cache
    YAML().dump(lock, copy / "dvc.lock")
    try:
        number = slurm.submit(project, "repro.sbatch")
        at = wait_until(lambda: last_checkpoint(project) >= 8 and last_checkpoint(project), 200, "a checkpoint")
        token = project.folder / "runs/slurm" / number / "token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert len(token.read_text()) == 64
        began = time.monotonic()
        slurm.run("scancel", "--batch", "--signal=TERM", number)
        wait_until(lambda: slurm.job(number)["Restarts"] == "1", 60, "the requeue")
        assert not (project.folder / "artifacts/model/model.safetensors").exists()
        text = slurm.wait(number, 400, project)
        print(f"signalled after step {at}, the pipeline finished {time.monotonic() - began:.0f} s later")
        assert slurm.job(number)["JobState"] == "COMPLETED", text[-4000:]
        resumed_at = int(re.findall(r"resuming from the checkpoint of step (\d+)", text)[-1])
        assert resumed_at >= at
        assert "start 2: Ray on 2 node(s)" in text
        assert text.count("Running stage 'prepare'") == 0, "finished stages do not run again"
        assert weights(project) == expected
        assert (project.folder / "artifacts/report/index.html").exists()
        assert left_behind(number) == []
    finally:
        kill_everything(project)


@pytest.fixture
def counted(tmp_path: Path) -> Project:
    """A DVC project of two stages that need no training: `count` writes its seed, `rest` sleeps for minutes."""
    project = Project(tmp_path / "counted")
    project.folder.mkdir()
    shutil.copytree(SCRIPTS, project.folder / "infra/slurm")
    (project.folder / "params.yaml").write_text("seed: 0\nname: none\n")
    (project.folder / "count.py").write_text(
        "from ruamel.yaml import YAML\n"
        "params = YAML(typ='safe').load(open('params.yaml'))\n"
        "open('count.txt', 'w').write(f\"{params['seed']} {params['name']}\")\n"
    )
    (project.folder / "dvc.yaml").write_text(
        "stages:\n"
        "  count:\n    cmd: python count.py\n    params: [seed, name]\n    outs: [count.txt]\n"
        "  rest:\n    cmd: sleep 300\n    deps: [count.txt]\n"
    )
    (project.folder / ".gitignore").write_text("/runs/\n/slurm-*.out\n")
    project.run("git", "init", "-q", "-b", "main")
    project.run("dvc", "init", "-q")
    project.commit()
    return project


@needs_slurm
@pytest.mark.infra
def test_each_task_of_an_array_runs_one_experiment_in_a_working_copy_of_its_own(slurm: Slurm, counted: Project) -> None:
    (counted.folder / "experiments.txt").write_text(
        "# two seeds\n-S seed=1 count\n\n-S seed=2 -S 'name=\"two words\"' count\n"
    )
    number = slurm.submit(counted, "experiments.sbatch", "experiments.txt", options=("--array=1-3",))
    texts = [slurm.wait(f"{number}_{task}", 200, counted, f"slurm-{number}_{task}.out") for task in (1, 2, 3)]
    assert "error: experiments.txt has 2 experiments and no number 3: submit with --array=1-2" in texts[2]
    names = [f"slurm-{number}-{task}" for task in (1, 2)]
    copies = [counted.folder / "runs/experiments" / name for name in names]
    assert all("done: exit status 0" in text for text in texts[:2]), texts
    assert [(copy / "count.txt").read_text() for copy in copies] == ["1 none", "2 two words"]
    assert not (counted.folder / "count.txt").exists(), "the project itself is not touched"
    shown = counted.run("dvc", "exp", "list", "--name-only")
    assert sorted(shown.split()) == names
    counted.run("dvc", "exp", "apply", names[1])
    assert (counted.folder / "count.txt").read_text() == "2 two words"  # from the shared cache


def submit_and_wait_for_sleep(slurm: Slurm, counted: Project) -> tuple[str, Path]:
    """Submit the project and return the job and its output as soon as its last stage runs."""
    number = slurm.submit(counted, "repro.sbatch")
    output = counted.folder / f"slurm-{number}.out"
    wait_until(lambda: output.exists() and "> sleep 300" in output.read_text(), 120, "the stage")
    return number, output


@needs_slurm
@pytest.mark.infra
def test_cancelled_job_is_not_requeued_and_leaves_nothing_on_the_nodes(slurm: Slurm, counted: Project) -> None:
    number, output = submit_and_wait_for_sleep(slurm, counted)
    slurm.run("scancel", number)
    wait_until(lambda: slurm.job(number)["JobState"] == "CANCELLED", 60, "the end of the job")
    wait_until(lambda: not left_behind(number), 60, "empty nodes")
    assert slurm.job(number)["Restarts"] == "0"
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "300"]]
    assert "left to Slurm" in output.read_text()


@needs_slurm
@pytest.mark.infra
def test_signal_to_the_steps_as_before_a_preemption_requeues_the_job(slurm: Slurm, counted: Project) -> None:
    number, output = submit_and_wait_for_sleep(slurm, counted)
    slurm.run("scancel", "--signal=TERM", number)
    wait_until(lambda: slurm.job(number)["Restarts"] == "1", 60, "the requeue")
    wait_until(lambda: output.read_text().count("> sleep 300") == 2, 120, "the second start")
    text = output.read_text()
    assert "a signal to the job's steps, job " in text
    assert text.count("> python count.py") == 1, "the finished stage does not run again"
    slurm.run("scancel", number)
    wait_until(lambda: slurm.job(number)["JobState"] == "CANCELLED" and not left_behind(number), 60, "empty nodes")


@needs_slurm
@pytest.mark.infra
def test_nodes_that_do_not_join_in_time_are_told_in_one_line(slurm: Slurm, counted: Project) -> None:
    text = slurm.run(
        "sbatch",
        "--wait",
        "--cpus-per-task=1",
        "infra/slurm/repro.sbatch",
        cwd=counted.folder,
        check=False,
        REDIFFUSE_JOIN_SECONDS="1",
    )
    number = re.search(r"Submitted batch job (\d+)", text).group(1)
    output = (counted.folder / f"slurm-{number}.out").read_text()
    assert re.search(r"error: \d of 2 nodes joined Ray at \S+ within 1 s", output), output
    assert slurm.job(number)["ExitCode"] == "3:0"
    assert "Running stage" not in output
    assert left_behind(number) == []


@needs_slurm
@pytest.mark.infra
def test_slurm_accepts_the_scripts_as_the_readme_submits_them(slurm: Slurm) -> None:
    for line in re.findall(r"^sbatch .*", (SCRIPTS / "README.md").read_text(), re.MULTILINE):
        words = [word for word in line.split("#")[0].split() if not word.startswith(SIZES)]
        words = ["--array=1-3" if word.startswith("--array") else word for word in words]
        text = slurm.run(words[0], "--test-only", "--cpus-per-task=1", *words[1:], cwd=ROOT)
        assert "to start at" in text


def test_line_of_an_experiment_is_split_as_a_shell_would(tmp_path: Path) -> None:
    file = tmp_path / "e.txt"
    file.write_text("# seeds\n\n-S train.seed=1\n  -S '+prepare.dataset_options.split=letters' -S a=b#c\n-S 'open\n")

    def read(number: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPTS / "read_experiment.py"), str(file), number]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert read("1").stdout.split("\0") == ["-S", "train.seed=1", ""]
    assert read("2").stdout.split("\0") == ["-S", "+prepare.dataset_options.split=letters", "-S", "a=b#c", ""]
    assert read("3").stderr == "error: line 5 of e.txt: No closing quotation; close the quote\n"
    assert read("4").stderr == "error: e.txt has 3 experiments and no number 4: submit with --array=1-3\n"
    assert read("0").returncode == 1


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install shellcheck")
def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    scripts = [path.name for path in sorted(SCRIPTS.iterdir()) if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 4
    result = subprocess.run(["shellcheck", "-x", *scripts], cwd=SCRIPTS, capture_output=True, text=True, check=False)
    assert result.stdout == ""
    assert result.returncode == 0
