"""The README's commands on a fresh Debian 12, as a user without root rights and with an empty home folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT, merge
from tests.infra.test_project import readme_commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

PACKAGES = "python3-venv,git,ca-certificates"  # the README's requirements
UID = "1000"
FREE_GIB = 12  # the root, the environment and the downloads, without the copy of the uv cache
CERTIFICATES = ("SSL_CERT_FILE", "PIP_CERT")
NETWORK = (  # how this machine reaches its package index
    *CERTIFICATES,
    *("UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
)
# $0 is the root. The mounts and processes end with the namespace.
ENTER = """
mount -t proc proc "$0/proc"
mount --rbind /sys "$0/sys"
mount --rbind /dev "$0/dev"
mount -t tmpfs -o mode=1777 tmpfs "$0/dev/shm"
exec chroot --userspec=UID:UID --groups= "$0" "$@"
""".replace("UID", UID)
NAMESPACE = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]


@dataclass
class Machine:
    """A Debian root with the project in /srv/project."""

    root: Path

    @property
    def project(self) -> Path:
        return self.root / "srv/project"

    def run(self, command: str) -> str:
        """Run a shell command in the project as the plain user. Return its output; fail if the command fails."""
        environment = {
            "HOME": "/srv/home",
            "LANG": "C.UTF-8",
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "UV_CACHE_DIR": "/var/cache/uv",
            **{name: os.environ[name] for name in NETWORK if name in os.environ},
        }
        result = subprocess.run(
            [*NAMESPACE, "sh", "-euc", ENTER, str(self.root), "bash", "-c", f"cd /srv/project && {command}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
            check=False,
        )
        assert result.returncode == 0, f"{command} returned {result.returncode}:\n{result.stdout[-6000:]}"
        return result.stdout


def reason_to_skip(folder: Path, cache: Path) -> str | None:
    """Return why this machine cannot build a Debian root in `folder`, or None."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("debootstrap") is None:
        return "needs debootstrap"
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode != 0:
        return "needs mount namespaces"
    size = int(subprocess.check_output(["du", "-sk", str(cache)]).split()[0]) if cache.is_dir() else 0
    needed = FREE_GIB + size / 2**20
    if shutil.disk_usage(folder).free < needed * 2**30:
        return f"needs {needed:.0f} GiB of disk"
    return None


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A bookworm root with the working tree under git, the smoke budget and a warm uv cache."""
    cache = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache/uv")
    reason = reason_to_skip(tmp_path, cache)
    if reason:
        pytest.skip(reason)
    root = tmp_path / "bookworm"
    try:
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if "Failed getting release file" in built.stdout + built.stderr:
            pytest.skip("needs debootstrap's Debian mirror")
        assert built.returncode == 0, built.stdout[-3000:]
        made = Machine(root)
        copy_project(made.project)
        for name in ("/etc/resolv.conf", "/etc/hosts", *(os.environ.get(name) for name in CERTIFICATES)):
            if name:
                shutil.copy(name, root / name.lstrip("/"))
        subprocess.run(["chroot", str(root), "useradd", "--no-create-home", "--uid", UID, "user"], check=True)
        (root / "srv/home").mkdir()
        (root / "var/cache/uv").mkdir()
        if cache.is_dir():
            subprocess.run(["cp", "-a", f"{cache}/.", str(root / "var/cache/uv")], check=True)
        owned = [str(root / name) for name in ("srv/project", "srv/home", "var/cache/uv")]
        subprocess.run(["chown", "-R", f"{UID}:{UID}", *owned], check=True)
        yield made
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", str(root)], check=True)


def copy_project(folder: Path) -> None:
    """Commit the working tree to a new repository in `folder`, then merge the smoke budget into params.yaml."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t.invalid"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "state"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    merge(params, YAML(typ="safe").load(folder / "budget/smoke.yaml"))
    yaml.dump(params, folder / "params.yaml")


def test_readme_commands_work_on_a_fresh_debian_without_root_rights(machine: Machine) -> None:
    pipeline, tests = readme_commands()

    machine.run(pipeline)
    assert "<html" in (machine.project / "artifacts/report/index.html").read_text(encoding="utf-8")
    assert json.loads((machine.project / "artifacts/registration.json").read_text())["promoted"] is True
    assert "home = /usr/bin" in (machine.project / ".venv/pyvenv.cfg").read_text()  # Debian's own Python

    again = machine.run(pipeline)
    assert "Data and pipelines are up to date." in again
    assert "tests/infra/test_fresh_machine.py" in machine.run(f"{tests} --collect-only -q -m slow")

    untracked = machine.run("git status --porcelain --untracked-files=all | grep '^??' || true").split()
    assert not [name for name in untracked if name.startswith((".uv/", ".venv/"))]
