"""infra/cloud: launcher files pass Ray's schema and the providers' own, the SkyPilot task passes SkyPilot's, and costs are computed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipelines.params import load_run_settings
from tests.conftest import ROOT
from tests.infra.kustomize import load_all
from tests.infra.test_kuberay import names_read_by_the_code

CLOUD = ROOT / "infra" / "cloud"
PROVIDERS = ["aws", "gcp"]


def launcher(provider: str) -> dict[str, Any]:
    tree: dict[str, Any] = load_all((CLOUD / f"{provider}.yaml").read_text(encoding="utf-8"))[0]
    return tree


def sky_task() -> dict[str, Any]:
    tree: dict[str, Any] = load_all((CLOUD / "sky.yaml").read_text(encoding="utf-8"))[0]
    return tree


@pytest.mark.parametrize("provider", PROVIDERS)
def test_launcher_file_passes_rays_schema_and_its_own_check(provider: str) -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = launcher(provider)
    jsonschema.validate(config, schema)
    prepared = prepare_config(config)  # with the provider's defaults, as `ray up` does
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "cpu", "gpu"}, "a node type of the defaults is left"
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config({**prepared, "idle_timeout": 5})


def test_aws_machines_are_arguments_of_run_instances() -> None:
    pytest.importorskip("botocore", reason="botocore (the model of the EC2 interface) is not installed")
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node_type in launcher("aws")["available_node_types"].items():
        report = ParamValidator().validate({**node_type["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"


def test_gcp_machines_are_instances_of_the_compute_interface() -> None:
    module = pytest.importorskip(
        "googleapiclient", reason="google-api-python-client (the model of Compute Engine) is not installed"
    )
    documents = Path(module.__path__[0]) / "discovery_cache" / "documents"
    schemas = json.loads((documents / "compute.v1.json").read_text())["schemas"]

    def check(value: Any, schema: dict[str, Any], where: str) -> None:
        schema = schemas[schema["$ref"]] if "$ref" in schema else schema
        if schema["type"] == "object" and "properties" in schema:
            assert isinstance(value, dict), where
            for key, each in value.items():
                assert key in schema["properties"], f"{where}: unknown key {key}"
                check(each, schema["properties"][key], f"{where}.{key}")
        elif schema["type"] == "array":
            for each in value:
                check(each, schema["items"], where)
        elif "enum" in schema:
            assert value in schema["enum"], where

    for name, node_type in launcher("gcp")["available_node_types"].items():
        check(node_type["node_config"], {"$ref": "Instance"}, name)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_head_is_on_demand_and_workers_are_spot_and_end_when_idle(provider: str) -> None:
    config = launcher(provider)

    def is_spot(node_type: dict[str, Any]) -> bool:
        node = node_type["node_config"]
        market = node.get("InstanceMarketOptions", {}).get("MarketType")
        return market == "spot" or node.get("scheduling", {}).get("provisioningModel") == "SPOT"

    assert 0 < config["idle_timeout_minutes"] <= 15
    for name, node_type in config["available_node_types"].items():
        assert is_spot(node_type) == (name != config["head_node_type"])
        if name == config["head_node_type"]:
            assert node_type["resources"] == {"CPU": 0}
        else:
            assert node_type["min_workers"] == 0 < node_type["max_workers"] <= config["max_workers"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_launcher_commands_fit_the_project(provider: str) -> None:
    from ray._private import ray_constants

    config = launcher(provider)
    assert config["file_mounts"] == {"~/rediffuse": "."}
    assert all((ROOT / name).exists() for name in config["rsync_filter"])
    commands = [command for key, value in config.items() if key.endswith("commands") for command in value]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
        assert command.startswith(("cd ~/rediffuse && ", "source ~/rediffuse/.venv/bin/activate && "))
    (head,) = [each for each in commands if "--head" in each]
    (worker,) = [each for each in commands if "--address=$RAY_HEAD_IP" in each]
    assert f"--port={ray_constants.DEFAULT_PORT} " in head and worker.endswith(f":{ray_constants.DEFAULT_PORT}")
    assert "--dashboard-host=127.0.0.1" in head, "the dashboard must not listen on a public address"


def test_run_settings_are_accepted_and_fit_the_machines() -> None:
    run = load_run_settings(CLOUD / "run.yaml")
    assert run.ray.address == "auto" and run.ray.storage.startswith("s3://BUCKET")
    for provider in PROVIDERS:
        machine = launcher(provider)["available_node_types"]["gpu"]
        for count, cpus, gpus in (
            (run.train.num_workers, run.train.cpus_per_worker, run.train.gpus_per_worker),
            (run.tune.max_concurrent, run.tune.cpus_per_trial, run.tune.gpus_per_trial),
            (run.evaluate.max_concurrent, run.evaluate.cpus_per_task, run.evaluate.gpus_per_task),
        ):
            assert isinstance(count, int) and count <= machine["max_workers"]
            assert isinstance(cpus, float | int) and cpus <= machine["resources"]["CPU"]
            assert isinstance(gpus, float | int) and gpus <= machine["resources"]["GPU"]


def test_sky_task_passes_skypilots_schema() -> None:
    python = os.environ.get("SKYPILOT_PYTHON")
    if python is None:
        if importlib.util.find_spec("sky") is None:
            pytest.skip(
                "SkyPilot is not installed; a Python that has it may be named by SKYPILOT_PYTHON (infra/cloud/README.md)"
            )
        python = sys.executable
    code = """
import sys, yaml
from sky.utils import common_utils, schemas
task = yaml.safe_load(open(sys.argv[1]))
def check(task):
    common_utils.validate_schema(task, schemas.get_task_schema(), "task: ")
    common_utils.validate_schema(task["resources"], schemas.get_resources_schema(), "resources: ")
    for mount in task["file_mounts"].values():
        common_utils.validate_schema(mount, schemas.get_storage_schema(), "storage: ")
check(task)
task["resources"]["use_spott"] = True
try:
    check(task)
except ValueError as error:
    assert "use_spott" in str(error), error
    print("valid, and a misspelled key is refused")
"""
    result = subprocess.run([python, "-c", code, str(CLOUD / "sky.yaml")], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "valid, and a misspelled key" in result.stdout, result.stdout + result.stderr


def test_sky_task_uses_spot_and_names_that_the_code_reads() -> None:
    import mlflow.environment_variables as mlflow_variables

    task = sky_task()
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    known = names_read_by_the_code() | {str(getattr(each, "name", "")) for each in vars(mlflow_variables).values()}
    for name in {*task["envs"], *task["secrets"]} - {"STATE_BUCKET"}:
        assert name in known, name
    assert not task["secrets"]["MLFLOW_TRACKING_PASSWORD"]
    for key in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[key]], check=True)


@pytest.mark.infra
def test_sky_task_on_a_new_machine_resumes_from_the_bucket(tmp_path: Path) -> None:
    """The task's own script with a folder as the bucket: the second machine gets a fresh copy of the project."""
    bucket = tmp_path / "bucket"
    script = sky_task()["run"].replace("/state/", f"{bucket}/")
    source = tmp_path / "source"
    (source / ".dvc").mkdir(parents=True)
    (source / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    count = f"echo ran >> {tmp_path}/first.txt"
    (source / "dvc.yaml").write_text(
        "stages:\n"
        f"  first:\n    cmd: {count} && mkdir -p artifacts && echo 1 > artifacts/one\n    outs: [artifacts/one]\n"
        f"  second:\n    cmd: mkdir -p runs && echo step >> runs/steps && test -e {tmp_path}/free && cp runs/steps artifacts/two\n"
        "    deps: [artifacts/one]\n    outs: [artifacts/two]\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(tmp_path)

    def machine(name: str) -> tuple[int, Path]:
        folder = tmp_path / name
        shutil.copytree(source, folder)
        (folder / ".venv").symlink_to(sys.prefix)
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", "-c", script], cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False, timeout=120
        )
        return result.returncode, folder

    status, _ = machine("taken")
    assert status != 0
    (tmp_path / "free").touch()
    status, folder = machine("next")
    assert status == 0
    assert (tmp_path / "first.txt").read_text() == "ran\n", "a finished stage ran again"
    assert (folder / "artifacts" / "two").read_text() == "step\nstep\n", "the state under runs/ was lost"


def test_readme_holds_the_table_that_cost_py_prints() -> None:
    printed = subprocess.run([sys.executable, str(CLOUD / "cost.py")], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() in (CLOUD / "README.md").read_text()


def test_cost_is_hours_times_machines_and_repeated_work() -> None:
    specification = importlib.util.spec_from_file_location("cost", CLOUD / "cost.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.INTERRUPTIONS_PER_HOUR = 0.0
    assert module.cost(10, 0.2, 4, 1.0) == pytest.approx(42.0)
    module.INTERRUPTIONS_PER_HOUR, module.CHECKPOINT_MINUTES, module.REPLACEMENT_MINUTES = 1.0, 60.0, 30.0
    assert module.cost(1, 0.0, 1, 1.0) == pytest.approx(2.0)  # each hour repeats an hour


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_machine_has_a_price_or_says_that_it_is_missing(provider: str) -> None:
    prices = load_all((CLOUD / "prices.yaml").read_text())[0][provider]
    config = launcher(provider)
    assert prices["region"] == config["provider"]["region"]
    assert re.fullmatch(r"[0-9a-f]{40}", prices["source"]["commit"])
    machines = {
        each["node_config"].get("InstanceType") or each["node_config"].get("machineType")
        for each in config["available_node_types"].values()
    }
    assert set(prices["machines"]) == machines
    for price in prices["machines"].values():
        if price["spot"] is not None:
            low, high = price["spot"]
            assert 0 < low <= high <= price["on_demand"]
