"""Manifests and chart of a site and a server in a cluster: hardened, walled, of one replica, and equal to each other.

``make test-chart`` renders them by kustomize and by Go's text/template, and holds them against Kubernetes' schemas.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedveil.deploy.server_folder import CONTROL_PORT, FLEET_PORT

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS, CHART = ROOT / "deploy" / "kubernetes", ROOT / "deploy" / "chart"
ROLES = {"site": "/site", "server": "/federation"}
VERSIONS = ("1.28", "1.31", "1.34", "1.37")
"""Of Kubernetes."""
Objects = dict[str, dict[str, Any]]


def by_kind(text: str) -> Objects:
    """Return the objects of a YAML text by their kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(text) if each}


def manifest(role: str) -> Objects:
    """Return a role's objects as they are written, without kustomize."""
    return by_kind((MANIFESTS / role / f"{role}.yaml").read_text(encoding="utf-8"))


def check_that_pods_are_hardened(role: str, found: Objects) -> None:
    spec = found["StatefulSet"]["spec"]
    pod = spec["template"]["spec"]
    assert spec["replicas"] == 1
    assert not pod["automountServiceAccountToken"]
    assert {key: pod["securityContext"][key] for key in ("runAsNonRoot", "runAsUser", "fsGroup")} == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "fsGroup": 10001,
    }
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch", "a group may write the ledger"
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        assert not pod.get(key)
    (container,) = pod["containers"]
    assert container["args"] == [role, "start", ROLES[role]]
    probe = ["fedveil", "doctor", ROLES[role], "--health"]
    assert container["readinessProbe"]["exec"]["command"] == probe
    assert ("livenessProbe" in container) == (role == "server"), "a site that is restarted in a round pays twice"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["keys"]["secret"]["defaultMode"] == 0o400
    assert volumes["folder"]["emptyDir"]["medium"] == "Memory", "keys are on a disk"
    assert not any("keys" in (mount["name"] for mount in each["volumeMounts"]) for each in pod["containers"])
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert set(spec["persistentVolumeClaimRetentionPolicy"].values()) == {"Retain"}, "a ledger goes with its pod"
    durable = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == claim["metadata"]["name"]}
    kept = {"site": ["ledger"], "server": ["state", "runs", "nodes"]}[role]
    assert {f"{ROLES[role]}/{place}" for place in kept} <= durable


def check_that_networks_are_walled(role: str, found: Objects) -> None:
    policy, pod = found["NetworkPolicy"]["spec"], found["StatefulSet"]["spec"]["template"]
    assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    fleet = [{"protocol": "TCP", "port": FLEET_PORT}]
    if role == "site":
        assert policy["ingress"] == []
        (alias,) = pod["spec"]["hostAliases"]
        assert policy["egress"] == [{"to": [{"ipBlock": {"cidr": f"{alias['ip']}/32"}}], "ports": fleet}]
        assert "Service" not in found
        return
    assert (policy["ingress"], policy["egress"]) == ([{"ports": fleet}], [])
    (port,) = found["Service"]["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (FLEET_PORT, "fleet")
    assert pod["spec"]["containers"][0]["ports"] == [{"name": "fleet", "containerPort": FLEET_PORT}]
    assert str(CONTROL_PORT) not in json.dumps(found)


def check(role: str, found: Objects) -> None:
    check_that_pods_are_hardened(role, found)
    check_that_networks_are_walled(role, found)


@pytest.mark.parametrize("role", ROLES)
def test_manifests_are_hardened_and_walled(role: str) -> None:
    check(role, manifest(role))


def of_pod(change: Callable[[dict[str, Any]], object]) -> Callable[[Objects], object]:
    return lambda found: change(found["StatefulSet"]["spec"]["template"]["spec"])


FAULTS: dict[str, Callable[[Objects], object]] = {
    "two replicas": lambda found: found["StatefulSet"]["spec"].update(replicas=2),
    "a shared volume": lambda found: found["StatefulSet"]["spec"]["volumeClaimTemplates"][0]["spec"].update(
        accessModes=["ReadWriteMany"]
    ),
    "root": of_pod(lambda pod: pod["securityContext"].update(runAsNonRoot=False)),
    "a group that writes": of_pod(lambda pod: pod["securityContext"].pop("fsGroupChangePolicy")),
    "no seccomp": of_pod(lambda pod: pod["securityContext"].pop("seccompProfile")),
    "a root file system to write": of_pod(
        lambda pod: pod["initContainers"][0]["securityContext"].update(readOnlyRootFilesystem=False)
    ),
    "a capability": of_pod(
        lambda pod: pod["containers"][0]["securityContext"].update(capabilities={"drop": ["ALL"], "add": ["NET_ADMIN"]})
    ),
    "no limit": of_pod(lambda pod: pod["containers"][0]["resources"].pop("limits")),
    "another probe": of_pod(lambda pod: pod["containers"][0]["readinessProbe"].update(exec={"command": ["true"]})),
    "ingress": lambda found: found["NetworkPolicy"]["spec"].update(ingress=[{}]),
    "egress": lambda found: found["NetworkPolicy"]["spec"]["egress"].append({}),
    "the other port": lambda found: found["NetworkPolicy"]["spec"]["ingress"].append(
        {"ports": [{"protocol": "TCP", "port": CONTROL_PORT}]}
    ),
    "no policy of egress": lambda found: found["NetworkPolicy"]["spec"].update(policyTypes=["Ingress"]),
    "other pods": lambda found: found["NetworkPolicy"]["spec"].update(podSelector={"matchLabels": {"x": "y"}}),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_wall_that_is_taken_away_is_found(fault: str, role: str) -> None:
    found = copy.deepcopy(manifest(role))
    FAULTS[fault](found)
    with pytest.raises((AssertionError, KeyError)):
        check(role, found)


def test_images_and_chart_are_of_this_version_and_no_manifest_is_in_wheel_or_image() -> None:
    version = re.search(r'(?m)^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]  # type: ignore[index]
    for role in ROLES:
        (image,) = yaml.safe_load((MANIFESTS / role / "kustomization.yaml").read_text(encoding="utf-8"))["images"]
        assert (image["name"], image["newTag"]) == (f"fedveil-{role}", version)
        assert f"AS {role}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert {chart["version"], chart["appVersion"]} == {version}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored.index("deploy/chart") > ignored.index("!deploy") < ignored.index("deploy/kubernetes")


def rendered(role: str, change: Callable[[dict[str, Any]], object] = lambda _: None) -> str:
    """Return what Go's text/template makes of the chart with a role's values, changed."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    values |= {"role": role, "image": f"fedveil-{role}:0.1.0"}
    change(values)
    done = subprocess.run(
        ["go", "run", "tools/chart.go", "deploy/chart", f"fedveil-{role}"],
        cwd=ROOT,
        env={**os.environ, "GO111MODULE": "off", "GOPATH": "/usr/share/gocode"},
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return done.stdout


def built(role: str) -> str:
    """Return what kustomize makes of a role's manifests."""
    words = ["kustomize", "build", str(MANIFESTS / role)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def check_against_schemas(found: Objects) -> None:
    import kubernetes_validate  # of 'make test-chart' alone

    for version in VERSIONS:
        for each in found.values():
            kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.chart
@pytest.mark.parametrize("role", ROLES)
def test_what_kustomize_and_the_chart_make_is_equal_hardened_and_valid(role: str) -> None:
    ours, theirs = by_kind(built(role)), by_kind(rendered(role))
    for found in (ours, theirs):
        check(role, found)
        check_against_schemas(found)
    pod = theirs["StatefulSet"]["spec"]["template"]["spec"]
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container.pop("imagePullPolicy") == "IfNotPresent"
    assert ours == theirs


@pytest.mark.chart
def test_values_reach_the_objects_and_a_role_that_is_none_is_refused() -> None:
    def change(values: dict[str, Any]) -> None:
        values["site"] |= {"address": "2001:db8::7", "port": 3128, "name": "proxy.example.org", "records": "mine"}
        values |= {"storageClass": "fast", "cpus": 4, "gpus": 1}

    found = by_kind(rendered("site", change))
    check_against_schemas(found)
    (way,) = found["NetworkPolicy"]["spec"]["egress"]
    assert way == {"to": [{"ipBlock": {"cidr": "2001:db8::7/128"}}], "ports": [{"protocol": "TCP", "port": 3128}]}
    spec = found["StatefulSet"]["spec"]
    assert spec["volumeClaimTemplates"][0]["spec"]["storageClassName"] == "fast"
    limits = spec["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "4", "memory": "4Gi", "nvidia.com/gpu": 1}
    with pytest.raises(AssertionError, match='role is "sites": write site or server'):
        rendered("site", lambda values: values.update(role="sites"))
    with pytest.raises(AssertionError, match="address"):
        rendered("site", lambda values: values["site"].pop("address"))


@pytest.mark.chart
def test_a_key_that_is_none_is_found_by_the_schemas() -> None:
    import kubernetes_validate

    found = manifest("site")
    context = found["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]["securityContext"]
    context["readOnlyRootFileSystem"] = context.pop("readOnlyRootFilesystem")
    with pytest.raises(kubernetes_validate.ValidationError):
        check_against_schemas(found)
