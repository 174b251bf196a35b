"""deploy/kubernetes/ray-batch.yaml: its pods are valid, and its command is one that scripts/batch takes."""

from typing import Any

import kubernetes_validate
import yaml

from musicgen_svc.cli.batch import arguments
from tests.cli.repository import ROOT

JOB, CLAIM = yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "ray-batch.yaml").read_text())
CLUSTER = JOB["spec"]["rayClusterSpec"]
PODS: list[dict[str, Any]] = [
    group["template"]["spec"] for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"])
]


def test_its_pods_are_valid() -> None:
    for spec in PODS:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "musicgen"}, "spec": spec}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_its_command_writes_to_the_volume_and_uses_every_worker() -> None:
    module, *given = JOB["spec"]["entrypoint"].removeprefix("python -P -m ").split()
    args = arguments(given)
    mounts = {mount["name"]: mount["mountPath"] for mount in PODS[0]["containers"][0]["volumeMounts"]}
    assert module == "musicgen_svc.cli.batch" and args.ray == "auto"
    assert args.out.is_relative_to(mounts["out"]) and args.jobs.is_relative_to(mounts["jobs"])
    assert args.workers == CLUSTER["workerGroupSpecs"][0]["replicas"]
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in PODS[0]["volumes"][1:]}
    assert claims == {CLAIM["metadata"]["name"]}
