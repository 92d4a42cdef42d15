"""Kubernetes objects of one engine: ConfigMap, Service, and a Deployment or, over several nodes, a LeaderWorkerSet.

Fields: the API reference of Kubernetes (apps/v1, v1) and of LeaderWorkerSet (leaderworkerset.x-k8s.io/v1,
``api/leaderworkerset/v1/leaderworkerset_types.go`` of kubernetes-sigs/lws).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.files import sha256_file
from toolchain.deploy.runtimes import ENGINE, HEALTH, REPOSITORY, Server
from toolchain.deploy.settings import GIB, DeploySettings, Placement, weight_bytes
from toolchain.triton.engine_dir import EngineDir

TEMPLATES = Path(__file__).parent / "templates"
USER = 1000
"""Not root; Ubuntu 24.04, the base of NVIDIA's images, has a user of that number."""
CPUS_PER_GPU = 4
"""For tokenizing, HTTP and each rank's host thread; a request, not a limit."""
HOST_GIB = 16
"""Host memory beside the weights, which are read through it: runtime, page-locked buffers, tokenizer."""
SHM_GIB_PER_GPU = 4
"""Ceiling of /dev/shm, where NCCL and Python's queues between ranks live; the 64 MiB of a plain pod are too few."""
PROBE_TIMEOUT_S = 30
LEADER = {"app.kubernetes.io/component": "leader"}


@dataclass(frozen=True, kw_only=True)
class Manifests:
    """What all objects of one engine share."""

    engine: EngineDir
    settings: DeploySettings
    placement: Placement
    server: Server
    name: str
    image: str

    @property
    def labels(self) -> dict[str, str]:
        return {"app.kubernetes.io/name": "toolchain-engine", "app.kubernetes.io/instance": self.name}

    @property
    def service_name(self) -> str:
        """A LeaderWorkerSet makes a headless Service of its own name, by which its pods find each other."""
        return f"{self.name}-api" if self.placement.nodes > 1 else self.name

    def objects(self) -> list[dict[str, Any]]:
        several = self.placement.nodes > 1
        return [self.config_map(), self.service(), self.leader_worker_set() if several else self.deployment()]

    def config_map(self) -> dict[str, Any]:
        """The scripts that run beside the server, so that published images need no rebuilding."""
        data = {name: (TEMPLATES / name).read_text(encoding="utf-8") for name in self.server.scripts}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self._metadata(), "data": data}

    def service(self) -> dict[str, Any]:
        selector = {**self.labels, **(LEADER if self.placement.nodes > 1 else {})}
        ports = [{"name": name, "port": port, "targetPort": name} for name, port in self.server.ports]
        spec = {"type": "ClusterIP", "selector": selector, "ports": ports}
        metadata = {**self._metadata(), "name": self.service_name}
        return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}

    def deployment(self) -> dict[str, Any]:
        """A new version waits for the GPUs of the old one: nobody has as many again to spare."""
        spec = {
            "replicas": self.settings.replicas,
            "selector": {"matchLabels": self.labels},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "progressDeadlineSeconds": 60 * self.settings.startup_minutes + 600,
            "template": self._pod(self.server.leader, self.labels, answers=True),
        }
        return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": self._metadata(), "spec": spec}

    def leader_worker_set(self) -> dict[str, Any]:
        """One group of nodes for each replica; when one of its pods ends, all of them begin again."""
        template = {
            "size": self.placement.nodes,
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": self._pod(self.server.leader, {**self.labels, **LEADER}, answers=True),
            "workerTemplate": self._pod(self.server.worker, self.labels, answers=False),
        }
        spec = {
            "replicas": self.settings.replicas,
            "startupPolicy": "LeaderCreated",
            "leaderWorkerTemplate": template,
        }
        return {
            "apiVersion": "leaderworkerset.x-k8s.io/v1",
            "kind": "LeaderWorkerSet",
            "metadata": self._metadata(),
            "spec": spec,
        }

    def _metadata(self) -> dict[str, Any]:
        return {"name": self.name, "labels": {**self.labels, "app.kubernetes.io/managed-by": "toolchain"}}

    def _pod(self, command: tuple[str, ...], labels: dict[str, str], *, answers: bool) -> dict[str, Any]:
        """A pod template. Another engine under the same name has another hash: pods are replaced."""
        spec: dict[str, Any] = {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 60,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [self._container(command, answers=answers)],
            "volumes": self._volumes(),
        }
        if self.settings.node_selector:
            spec["nodeSelector"] = dict(self.settings.node_selector)
        if self.placement.gpus:
            spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        annotations = {"toolchain/engine-sha256": sha256_file(self.engine.path / "engine.json")}
        return {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}

    def _container(self, command: tuple[str, ...], *, answers: bool) -> dict[str, Any]:
        container: dict[str, Any] = {
            "name": "server",
            "image": self.image,
            "args" if self.server.keeps_entry else "command": list(command),
            "env": _environment(),
            "resources": self._resources(),
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            "volumeMounts": self._mounts(),
        }
        if answers:
            container["ports"] = [{"name": name, "containerPort": port} for name, port in self.server.ports]
            container |= self._probes()
        return container

    def _probes(self) -> dict[str, Any]:
        """All three infer. Liveness is slow to judge: a full queue is no reason to load the weights again."""
        timeout = str(PROBE_TIMEOUT_S - 10)
        command = ["python3", f"{HEALTH}/health.py", *self.server.probe, "--timeout", timeout]
        probe = {"exec": {"command": command}, "timeoutSeconds": PROBE_TIMEOUT_S}
        return {
            "startupProbe": {
                **probe,
                "periodSeconds": 10,
                "failureThreshold": 6 * self.settings.startup_minutes,
            },
            "readinessProbe": {**probe, "periodSeconds": 30, "failureThreshold": 2},
            "livenessProbe": {**probe, "periodSeconds": 60, "failureThreshold": 5},
        }

    def _resources(self) -> dict[str, Any]:
        gpus = self.placement.gpus
        gib = -(-weight_bytes(self.engine) // (GIB * self.placement.nodes)) + HOST_GIB
        requests = {"cpu": str(CPUS_PER_GPU * max(1, gpus)), "memory": f"{gib}Gi"}
        if not gpus:
            return {"requests": requests}
        devices = {"nvidia.com/gpu": str(gpus)}
        return {"requests": {**requests, **devices}, "limits": devices}

    def _mounts(self) -> list[dict[str, Any]]:
        """The volume has the two folders as they stand in the working directory."""
        mounts: list[dict[str, Any]] = [
            {
                "name": "models",
                "mountPath": ENGINE,
                "subPath": f"engines/{self.engine.path.name}",
                "readOnly": True,
            },
            {"name": "scripts", "mountPath": HEALTH, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
        ]
        if self.server.repository:
            path = f"triton_repo/{self.engine.name}"
            mounts.append({"name": "models", "mountPath": REPOSITORY, "subPath": path, "readOnly": True})
        if self.server.ssh:
            mounts.append({"name": "ssh", "mountPath": "/ssh", "readOnly": True})
        return mounts

    def _volumes(self) -> list[dict[str, Any]]:
        shm_gib = SHM_GIB_PER_GPU * max(1, self.placement.gpus)
        volumes: list[dict[str, Any]] = [
            {
                "name": "models",
                "persistentVolumeClaim": {"claimName": self.settings.claim, "readOnly": True},
            },
            {"name": "scripts", "configMap": {"name": self.name, "defaultMode": 0o555}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}},
            {"name": "tmp", "emptyDir": {}},
        ]
        if self.server.ssh:
            secret = {"secretName": f"{self.name}-ssh", "defaultMode": 0o440}
            volumes.append({"name": "ssh", "secret": secret})
        return volumes


def _environment() -> list[dict[str, str]]:
    """Caches of kernels and of Python go where a user without a home may write; nothing is fetched while serving."""
    pairs = {"HOME": "/tmp", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return [{"name": name, "value": value} for name, value in pairs.items()]
