"""The manifests in deploy/kubernetes/ are valid, and agree with the service and with each other."""

import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from musicgen_svc.cli import probe
from musicgen_svc.settings import Settings, variable

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy" / "kubernetes"
Manifest = dict[str, Any]


def manifests() -> dict[tuple[str, str], Manifest]:
    """All objects, by kind and name."""
    found = [made for file in sorted(FOLDER.glob("*.yaml")) for made in yaml.safe_load_all(file.read_text())]
    by_name = {(made["kind"], made["metadata"]["name"]): made for made in found}
    assert len(by_name) == len(found)
    return by_name


MANIFESTS = manifests()
CUSTOM = ("ScaledObject", "RayJob")
"""Kinds of KEDA and KubeRay, which Kubernetes itself has no schema of."""
DEPLOYMENT = MANIFESTS["Deployment", "musicgen"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
(CONTAINER,) = POD["containers"]
JOB_POD = MANIFESTS["Job", "musicgen-weights"]["spec"]["template"]["spec"]
SCALING = MANIFESTS["ScaledObject", "musicgen"]["spec"]


def variables(container: Manifest) -> dict[str, str]:
    """The environment variables of a container."""
    return {entry["name"]: entry["value"] for entry in container["env"]}


ENVIRONMENT = variables(CONTAINER)
SETTINGS = Settings.from_environment(ENVIRONMENT)


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("key", [key for key in MANIFESTS if key[0] not in CUSTOM], ids="-".join)
def test_it_is_valid_against_kubernetes_schemas(key: tuple[str, str], version: str) -> None:
    kubernetes_validate.validate(MANIFESTS[key], version, strict=True)


def test_every_variable_is_one_that_is_read() -> None:
    assert ENVIRONMENT.keys() <= {variable(setting) for setting in fields(Settings)} | {"HOME"}
    scripts = (ROOT / "scripts" / "_env").read_text()
    job = variables(JOB_POD["containers"][0])
    assert job.keys() == {"MUSICGEN_NO_VENV", "MUSICGEN_WEIGHTS_DIR", "HF_HUB_OFFLINE", "HOME"}
    assert "MUSICGEN_NO_VENV" in scripts and "- HF_HUB_OFFLINE=1" in (ROOT / "cog.yaml").read_text()


def test_a_service_of_the_namespace_sets_no_variable() -> None:
    """A Service musicgen-metrics would set MUSICGEN_METRICS_PORT to tcp://..."""
    assert POD["enableServiceLinks"] is JOB_POD["enableServiceLinks"] is False


def test_each_probe_and_the_hook_are_commands_of_the_package() -> None:
    asked = {"startupProbe": "started", "readinessProbe": "ready", "livenessProbe": "alive"}
    assert set(asked.values()) == set(probe.QUESTIONS)
    for name, question in asked.items():
        assert CONTAINER[name]["exec"]["command"] == ["python", "-m", probe.__name__, question]
        assert CONTAINER[name]["timeoutSeconds"] > probe.ANSWER_S
    hook = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[:2] == ["python", "-m"] and importlib.util.find_spec(hook[2])
    download = JOB_POD["containers"][0]["command"][0]
    assert (ROOT / download).is_file()


def test_the_times_of_the_end_fit_together() -> None:
    """The hook may take the whole grace; then Cog sends its answers, and its worker ends."""
    assert POD["terminationGracePeriodSeconds"] >= SETTINGS.drain_grace_s + 30
    set_up_s = CONTAINER["startupProbe"]["failureThreshold"] * CONTAINER["startupProbe"]["periodSeconds"]
    assert DEPLOYMENT["progressDeadlineSeconds"] > set_up_s


def test_ports_and_names_lead_to_each_other() -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert ports == {"http": 5000, "metrics": SETTINGS.metrics_port}
    assert SETTINGS.metrics_host == "0.0.0.0"
    template = DEPLOYMENT["template"]["metadata"]
    assert template["annotations"]["prometheus.io/port"] == str(SETTINGS.metrics_port)
    service = MANIFESTS["Service", "musicgen"]["spec"]
    assert DEPLOYMENT["selector"]["matchLabels"] == service["selector"] == template["labels"]
    assert [port["targetPort"] for port in service["ports"]] == ["http"]
    assert SCALING["scaleTargetRef"]["name"] == MANIFESTS["Deployment", "musicgen"]["metadata"]["name"]
    assert "replicas" not in DEPLOYMENT, "an update would undo the scaling"


def test_weights_are_where_the_service_looks_and_only_tmp_is_writable() -> None:
    mounts = {mount["mountPath"]: mount for mount in CONTAINER["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert mounts.keys() == {str(SETTINGS.weights_dir), "/tmp"}
    claim = volumes[mounts["/weights"]["name"]]["persistentVolumeClaim"]
    assert ("PersistentVolumeClaim", claim["claimName"]) in MANIFESTS
    assert claim["readOnly"] and mounts["/weights"]["readOnly"]
    assert "emptyDir" in volumes[mounts["/tmp"]["name"]]
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    assert SETTINGS.drain_file and SETTINGS.drain_file.parent == Path(ENVIRONMENT["HOME"]) == Path("/tmp")
    assert POD["securityContext"] | {"fsGroupChangePolicy": None} == JOB_POD["securityContext"] | {
        "fsGroupChangePolicy": None
    }


def test_the_image_lets_another_user_than_root_run_its_python() -> None:
    assert POD["securityContext"]["runAsNonRoot"] and POD["securityContext"]["runAsUser"] > 0
    assert "chmod a+x /root" in yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]["run"]


def test_a_pod_comes_for_as_many_requests_as_one_has_slots() -> None:
    (trigger,) = SCALING["triggers"]
    assert trigger["metadata"]["threshold"] == ENVIRONMENT["MUSICGEN_SLOTS"]
    assert int(ENVIRONMENT["COG_MAX_CONCURRENCY"]) > int(ENVIRONMENT["MUSICGEN_SLOTS"]), "some may wait"
    for name in ("musicgen_queue_length", "musicgen_slots_in_use"):
        assert name in trigger["metadata"]["query"]
        assert f"`{name}`" in (ROOT / "docs" / "kubernetes.md").read_text()
