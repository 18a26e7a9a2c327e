"""infra/kuberay: every overlay is valid for Kubernetes and KubeRay, and its names, ports and paths are those of the code.

The overlays are rendered by kubectl or kustomize 5 if one is on the PATH, else by tests/infra/kustomize.py, which knows the part of
kustomize that they use; a test compares the two.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import psutil
import pytest

from pipelines.params import load_run_settings
from tests.conftest import ROOT, wait_until
from tests.infra.kustomize import load_all, real_command, render_subset, render_with

KUBERAY = ROOT / "infra" / "kuberay"
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())
SCHEMAS = ROOT.parent / "shared" / "reference" / "kuberay"
KUBERNETES = "1.31"  # the oldest release whose schema the manifests must pass; the newest is checked too
SCRIPTS = KUBERAY / "base" / "scripts"
POD_TEMPLATES = {"template", "submitterPodTemplate"}


@cache
def rendered(overlay: str) -> tuple[dict[str, Any], ...]:
    folder, command = KUBERAY / "overlays" / overlay, real_command()
    return tuple(render_with(command, folder) if command else render_subset(folder))


def objects(overlay: str, kind: str) -> list[dict[str, Any]]:
    return [each for each in rendered(overlay) if each["kind"] == kind]


def ray_object(overlay: str) -> dict[str, Any]:
    (found,) = objects(overlay, "RayJob") + objects(overlay, "RayCluster")
    return found


def cluster_spec(overlay: str) -> dict[str, Any]:
    spec = ray_object(overlay)["spec"]
    return spec.get("rayClusterSpec", spec)


def pod_templates(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every pod template in an object, at any depth."""
    if isinstance(tree, list):
        for each in tree:
            yield from pod_templates(each)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key in POD_TEMPLATES and isinstance(value, dict) and "spec" in value:
                yield value
            yield from pod_templates(value)


def containers(overlay: str) -> list[dict[str, Any]]:
    templates = [template for each in rendered(overlay) for template in pod_templates(each)]
    return [
        container
        for template in templates
        for container in template["spec"]["containers"] + template["spec"].get("initContainers", [])
    ]


def head(overlay: str) -> dict[str, Any]:
    (container,) = cluster_spec(overlay)["headGroupSpec"]["template"]["spec"]["containers"]
    return container


def closed(schema: Any) -> Any:
    """Return a CRD's schema that refuses unknown keys."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    tree = {key: closed(value) for key, value in schema.items()}
    if tree.pop("x-kubernetes-int-or-string", False):
        tree.pop("type", None)
        tree.pop("anyOf", None)
        tree["type"] = ["integer", "string"]
    if isinstance(tree.get("properties"), dict) and not tree.get("x-kubernetes-preserve-unknown-fields"):
        tree.setdefault("additionalProperties", False)
    return tree


@cache
def kuberay_schema(kind: str) -> dict[str, Any]:
    path = SCHEMAS / f"ray.io_{kind.lower()}s.yaml.gz"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are absent: {path.relative_to(ROOT.parent)}")
    definition = load_all(gzip.decompress(path.read_bytes()).decode())[0]
    (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def validate_kubernetes(tree: dict[str, Any]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for version in (KUBERNETES, kubernetes_validate.latest_version()):
        kubernetes_validate.validate(tree, version, strict=True)


@cache
def names_read_by_the_code() -> frozenset[str]:
    """Return the environment variables that the code reads or sets: constants in os.environ calls and subscripts, and QUIET's keys."""
    found: set[str] = set()
    for path in (*(ROOT / "pipelines").rglob("*.py"), *(ROOT / "diffusion_core").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, str)
        }
        for node in ast.walk(tree):
            argument: ast.expr | None = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                owner = ast.unparse(node.func.value)
                if owner in ("os.environ", "os") and node.func.attr in ("get", "setdefault", "pop", "getenv"):
                    argument = node.args[0]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                argument = node.slice
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("QUIET", "names"):
                found |= {each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant)}
            if isinstance(argument, ast.Constant):
                found.add(argument.value)
            elif isinstance(argument, ast.Name) and argument.id in constants:
                found.add(constants[argument.id])
    return frozenset(name for name in found if isinstance(name, str))


@cache
def names_read_by_pyarrow() -> frozenset[str]:
    """Return the names of AWS variables in pyarrow's binary, which holds the AWS library."""
    folder = Path(str(importlib.metadata.distribution("pyarrow").locate_file("pyarrow")))
    found = {each for path in folder.glob("libarrow.so*") for each in re.findall(rb"AWS_[A-Z_]+", path.read_bytes())}
    return frozenset(name.decode() for name in found)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_of_an_overlay_pass_the_published_schemas(overlay: str) -> None:
    kinds = []
    for each in rendered(overlay):
        kinds.append(each["kind"])
        if each["apiVersion"].startswith("ray.io/"):
            jsonschema.Draft202012Validator(kuberay_schema(each["kind"])).validate(each)
        else:
            validate_kubernetes(each)
    assert {"Deployment", "Service", "NetworkPolicy", "ConfigMap", "PersistentVolumeClaim"} <= set(kinds)
    assert len({"RayJob", "RayCluster"} & set(kinds)) == 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pod_templates_inside_of_ray_objects_pass_the_schema_of_kubernetes(overlay: str) -> None:
    templates = list(pod_templates(ray_object(overlay)))
    assert len(templates) == 1 + len(cluster_spec(overlay)["workerGroupSpecs"]) + (overlay.startswith("job"))
    for template in templates:
        validate_kubernetes(
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "checked"}, "template": template}
        )


def test_schemas_refuse_a_misspelled_key() -> None:
    cluster = load_all((KUBERAY / "cluster" / "ray_cluster.yaml").read_text())[0]
    cluster["spec"]["autoscalerOptions"]["idleTimeoutSecs"] = 1
    with pytest.raises(jsonschema.ValidationError, match="idleTimeoutSecs"):
        jsonschema.Draft202012Validator(kuberay_schema("RayCluster")).validate(cluster)
    template = next(pod_templates(cluster))
    template["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(jsonschema.ValidationError, match="terminationGracePeriod"):
        validate_kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {}, "template": template})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_subset_renders_what_kustomize_renders(overlay: str) -> None:
    command = real_command()
    if command is None:
        pytest.skip("neither kustomize nor kubectl with kustomize 5 is on the PATH")

    def ordered(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(found, key=lambda each: (each["kind"], each["metadata"]["name"]))

    folder = KUBERAY / "overlays" / overlay
    assert ordered(render_subset(folder)) == ordered(render_with(command, folder))


def test_job_and_cluster_have_the_same_ray_cluster() -> None:
    job = load_all((KUBERAY / "job" / "ray_job.yaml").read_text())[0]
    cluster = load_all((KUBERAY / "cluster" / "ray_cluster.yaml").read_text())[0]
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_run_settings_of_an_overlay_are_accepted_by_the_code(overlay: str, tmp_path: Path) -> None:
    (settings,) = [each for each in objects(overlay, "ConfigMap") if each["metadata"]["name"] == "rediffuse-run"]
    path = tmp_path / "run.yaml"
    path.write_text(settings["data"]["run.yaml"])
    run = load_run_settings(path)
    assert run.ray.address == "auto"
    assert run.ray.storage.startswith("s3://") == overlay.endswith("s3")
    # What a worker of the run takes must fit into a worker pod, and all of them into the group's pods.
    groups = cluster_spec(overlay)["workerGroupSpecs"]
    group = groups[-1]
    (worker,) = group["template"]["spec"]["containers"]
    limits = worker["resources"]["limits"]
    for count, cpus, gpus in (
        (run.train.num_workers, run.train.cpus_per_worker, run.train.gpus_per_worker),
        (run.tune.max_concurrent, run.tune.cpus_per_trial, run.tune.gpus_per_trial),
        (run.evaluate.max_concurrent, run.evaluate.cpus_per_task, run.evaluate.gpus_per_task),
    ):
        assert isinstance(count, int) and isinstance(cpus, float | int) and isinstance(gpus, float | int)
        assert count <= group["maxReplicas"]
        assert cpus <= float(limits["cpu"])
        assert gpus <= float(limits.get("nvidia.com/gpu", 0))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_environment_names_are_read_by_the_code_its_libraries_or_the_scripts(overlay: str) -> None:
    import mlflow.environment_variables as mlflow_variables
    import ray

    code = names_read_by_the_code()
    assert {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "REDIFFUSE_RUN", "RAY_AUTH_MODE"} <= code
    mlflow_names = {str(getattr(each, "name", "")) for each in vars(mlflow_variables).values()}
    scripts = "".join(path.read_text() for path in SCRIPTS.iterdir())
    script_names = set(re.findall(r"\$\{?([A-Z_]{3,})", scripts))
    for container in containers(overlay):
        for variable in container.get("env", ()):
            name = variable["name"]
            if name.startswith("AWS_"):  # read by the AWS library inside pyarrow's binary
                assert name in names_read_by_pyarrow()
            elif name.startswith("RAY_") and name not in code:
                sources = Path(ray.__file__).parent / "dashboard" / "modules" / "job"
                assert any(f'"{name}"' in path.read_text() for path in sources.glob("*.py")), name
            else:
                assert name in code | mlflow_names | script_names, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ports_probes_and_hosts_are_those_of_ray_and_mlflow(overlay: str) -> None:
    import mlflow.server.security_utils as security
    from ray._private import ray_constants
    from ray.dashboard import http_server_agent
    from ray.dashboard import http_server_head as dashboard

    head_ports = {each["name"]: each["containerPort"] for each in head(overlay)["ports"]}
    assert head_ports["gcs-server"] == ray_constants.DEFAULT_PORT
    assert head_ports["dashboard"] == ray_constants.DEFAULT_DASHBOARD_PORT
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = head(overlay)[name]["httpGet"]
        assert probe["port"] == "dashboard"
        # open without a token: the list in Ray's source
        assert f'"{probe["path"]}",' in Path(dashboard.__file__).read_text()
        for group in cluster_spec(overlay)["workerGroupSpecs"]:
            (worker,) = group["template"]["spec"]["containers"]
            ports = {each["name"]: each["containerPort"] for each in worker["ports"]}
            assert worker[name]["httpGet"]["path"] in http_server_agent.PUBLIC_EXACT_PATHS
            assert ports[worker[name]["httpGet"]["port"]] == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

    (service,) = objects(overlay, "Service")
    (deployment,) = objects(overlay, "Deployment")
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each.get("value") for each in head(overlay)["env"]}
    address = urlsplit(environment["MLFLOW_TRACKING_URI"])
    assert (address.hostname, address.port) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
    assert f"--port={server['ports'][0]['containerPort']}" in server["args"]
    allowed = next(each["value"] for each in server["env"] if each["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS").split(",")
    assert security.is_allowed_host_header(allowed, address.netloc)
    assert not security.is_allowed_host_header(allowed, "attacker.invalid")
    assert server["readinessProbe"]["httpGet"]["path"] in security.HEALTH_ENDPOINTS  # pods are probed by address

    policies = {each["metadata"]["name"]: each["spec"] for each in objects(overlay, "NetworkPolicy")}
    (rule,) = policies["rediffuse-operator"]["ingress"]
    assert [each["port"] for each in rule["ports"]] == [ray_constants.DEFAULT_DASHBOARD_PORT]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_paths_names_and_labels_of_an_overlay_fit_together(overlay: str) -> None:
    spec = cluster_spec(overlay)
    pod = spec["headGroupSpec"]["template"]["spec"]
    environment = {each["name"]: each.get("value") for each in head(overlay)["env"]}
    mounts = {each["mountPath"]: each["name"] for each in head(overlay)["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    maps = {each["metadata"]["name"]: each["data"] for each in objects(overlay, "ConfigMap")}

    def file_of(path: str) -> str:
        folder, name = path.rsplit("/", 1)
        return maps[volumes[mounts[folder]]["configMap"]["name"]][name]

    assert "ray:" in file_of(environment["REDIFFUSE_RUN"])
    hook = " ".join(head(overlay)["lifecycle"]["preStop"]["exec"]["command"])
    for path in re.findall(r"/etc/rediffuse/\S+\.sh", hook + " " + ray_object(overlay)["spec"].get("entrypoint", "")):
        assert file_of(path).startswith("#!/bin/bash")
    assert volumes[mounts["/etc/rediffuse/scripts"]]["configMap"]["defaultMode"] == 0o555
    assert mounts[environment["REDIFFUSE_PROJECT"]] == "project"
    # The project in the image may have the same path: the container that copies it must not hide it by the volume.
    (copy,) = pod["initContainers"]
    (target,) = copy["volumeMounts"]
    assert target["name"] == "project" and target["mountPath"] != environment["REDIFFUSE_PROJECT"]
    assert f"-C {target['mountPath']} " in copy["command"][-1] and "workingDir" not in copy

    # Every claim exists, and the workers mount the project only with a volume that all of them share.
    claims = {
        each["metadata"]["name"]: each["spec"]["accessModes"] for each in objects(overlay, "PersistentVolumeClaim")
    }
    assert volumes["project"]["persistentVolumeClaim"]["claimName"] in claims
    for group in spec["workerGroupSpecs"]:
        worker_volumes = {each["name"]: each for each in group["template"]["spec"]["volumes"]}
        assert ("emptyDir" in worker_volumes["project"]) == overlay.endswith("s3")
    assert claims["rediffuse-project"] == (["ReadWriteMany"] if overlay.endswith("pvc") else ["ReadWriteOnce"])

    # The policies select every pod, and Kubernetes waits longer than the hook.
    for template in (each for tree in rendered(overlay) for each in pod_templates(tree)):
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "rediffuse"
    waits = [int(number) for number in re.findall(r"stop_pipeline.sh (\d+)|--grace-period (\d+)", hook)[0] if number]
    assert pod["terminationGracePeriodSeconds"] > sum(waits) + 10
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) < waits[0]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_workers_start_at_zero_and_gpu_pods_tolerate_their_taints(overlay: str) -> None:
    spec = cluster_spec(overlay)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["rayVersion"] == importlib.metadata.version("ray")
    groups = {each["groupName"]: each for each in spec["workerGroupSpecs"]}
    assert set(groups) == ({"cpu"} if overlay == "job-cpu" else {"cpu", "gpu"})
    for name, group in groups.items():
        assert (group["minReplicas"], group["replicas"]) == (0, 0) and group["maxReplicas"] > 0
        (worker,) = group["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in worker["resources"]["limits"]) == (name == "gpu")
        keys = {each["key"] for each in group["template"]["spec"]["tolerations"]}
        assert ("nvidia.com/gpu" in keys) == (name == "gpu")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_placeholders_and_secrets_are_references(overlay: str) -> None:
    assert {each["image"] for each in containers(overlay)} == {"IMAGE_NAME:IMAGE_TAG"}
    assert not objects(overlay, "Secret")
    readme = (KUBERAY / "README.md").read_text()
    for container in containers(overlay):
        for variable in container.get("env", ()):
            if re.search(r"KEY|PASSWORD|TOKEN|SECRET", variable["name"]):
                reference = variable["valueFrom"]["secretKeyRef"]
                # the README's command makes this secret with this key
                assert re.search(rf"create secret generic {reference['name']}\b", readme)
                assert f"--from-literal={reference['key']}=" in readme


STAGE = """
import pathlib, signal, sys, time
def save(signum, frame):
    time.sleep(1)
    with open("saved", "a") as file:
        file.write("once ")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path("started").touch()
while not pathlib.Path("finish").exists():
    time.sleep(0.05)
pathlib.Path("out").write_text("done")
"""


@pytest.fixture
def stage_project(tmp_path: Path) -> Iterator[Path]:
    """A DVC project, outside of git, whose one stage saves on SIGTERM. Nothing of it is alive afterwards."""
    folder = tmp_path / "project"
    (folder / ".dvc" / "tmp").mkdir(parents=True)
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    (folder / "stage.py").write_text(STAGE)
    (folder / "dvc.yaml").write_text(f"stages:\n  train:\n    cmd: {sys.executable} stage.py\n    outs: [out]\n")
    yield folder
    for group in groups_in(folder):
        os.killpg(group, signal.SIGKILL)


def groups_in(folder: Path) -> set[int]:
    """Return the process groups of the processes whose working folder is ``folder``, except this one's."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.cwd() == str(folder):
                found.add(os.getpgid(process.pid))
    return found - {os.getpgid(0)}


def run_script(folder: Path, name: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPTS / name), *arguments],
        cwd=folder.parent,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("DVC_")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "GIT_CEILING_DIRECTORIES": str(folder.parent),
            "REDIFFUSE_PROJECT": str(folder),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # as `ray job submit` and the hook of a pod start them
    )


@pytest.mark.infra
def test_stop_script_lets_the_stage_save_once_and_the_next_start_finishes(stage_project: Path) -> None:
    pipeline = run_script(stage_project, "run_pipeline.sh")
    wait_until(lambda: (stage_project / "started").exists() or pipeline.poll() is not None, 60, "the stage starts")
    second = run_script(stage_project, "run_pipeline.sh")
    assert second.wait(30) == 1 and "another pipeline is running" in (second.stdout or sys.stdin).read()

    began = time.monotonic()
    stop = run_script(stage_project, "stop_pipeline.sh", "30")
    assert stop.wait(40) == 0
    assert time.monotonic() - began >= 1, "the hook must not return before the stage has saved"
    assert (stage_project / "saved").read_text() == "once "
    assert pipeline.wait(5) == 143, pipeline.stdout and pipeline.stdout.read()

    # The lock of a pod that died: its process id belongs to another process of the next pod.
    (stage_project / ".dvc" / "tmp" / "rwlock").write_text(
        json.dumps({str(stage_project / "out"): {"write": {"pid": os.getpid(), "cmd": "dvc repro"}}})
    )
    (stage_project / "finish").touch()
    again = run_script(stage_project, "run_pipeline.sh")
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0, output
    assert (stage_project / "out").read_text() == "done"


@pytest.mark.infra
def test_stop_script_returns_at_once_if_no_pipeline_runs(stage_project: Path) -> None:
    (stage_project / "runs").mkdir()
    (stage_project / "runs" / "pipeline.lock").touch()
    (stage_project / "runs" / "pipeline.group").write_text(str(os.getpgid(0)))  # of another pod: must get no signal
    assert run_script(stage_project, "stop_pipeline.sh", "30").wait(10) == 0


def test_pipeline_script_passes_on_the_status_of_a_failed_stage(stage_project: Path) -> None:
    (stage_project / "stage.py").write_text("raise SystemExit(3)\n")
    failed = run_script(stage_project, "run_pipeline.sh")
    output, _ = failed.communicate(timeout=60)
    assert failed.returncode not in (0, 143), output
    assert "failed to run" in output


FORBIDDEN = {
    "an absolute path of a machine": re.compile(r"/(?:root|work|Users|home/(?!ubuntu\b|ray\b)\w+)/"),
    "a registry host": re.compile(
        r"\b(?:docker\.io|ghcr\.io|quay\.io|nvcr\.io|gcr\.io|[\w.-]+\.pkg\.dev|[\w.-]+\.dkr\.ecr\.[\w.-]+|[\w.-]+\.azurecr\.io)\b"
    ),
    "a credential": re.compile(
        r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|-----BEGIN|\bghp_\w{20,}|\bxox[bp]-|\beyJ[\w-]{20,}\.|(?i:password|secret|token)[\w-]*[=:] *['\"]?(?![$'\"{<]|\s|secretKeyRef|valueFrom|token\b|null)[A-Za-z0-9+/]{12,}"
    ),
}


@pytest.mark.parametrize("folder", ["kuberay", "cloud"])
def test_no_file_holds_a_machine_path_a_credential_or_a_registry(folder: str) -> None:
    files = [path for path in (ROOT / "infra" / folder).rglob("*") if path.is_file()]
    assert files
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            for what, pattern in FORBIDDEN.items():
                assert not pattern.search(line), f"{path.relative_to(ROOT)} holds {what}: {line.strip()}"
    for what, example in {
        "an absolute path of a machine": "cd /" + "work/main",
        "a registry host": "image: ghcr.io/someone/image",
        "a credential": "AWS_SECRET_ACCESS_KEY=abcdefghijklmnopqrstuvwx",
    }.items():
        assert FORBIDDEN[what].search(example), what
