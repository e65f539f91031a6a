"""config/kubernetes: what `kubectl kustomize` makes of it is what an API server takes, and fits together."""

import copy
import json
import re
import subprocess
import tempfile
import tomllib
import unittest
from pathlib import Path

import cel
import kubernetes_validate
import yaml

from node import build_image
from project import SOURCE

KUBERNETES = SOURCE / "config/kubernetes"
# The oldest and the newest that there are schemas of.
RELEASES = ("1.25", "1.37")
# When what the base does not hold came into the API.
SINCE = {"ValidatingAdmissionPolicy": "1.30", "ValidatingAdmissionPolicyBinding": "1.30"}
QUANTITY = re.compile(r"[0-9]+(m|Ki|Mi|Gi)?")


def rendered(directory: str = "base") -> list[dict]:
    outcome = subprocess.run(["kubectl", "kustomize", KUBERNETES / directory], check=True, capture_output=True, text=True)
    return list(yaml.safe_load_all(outcome.stdout))


def kubectl_release() -> tuple[int, int]:
    outcome = subprocess.run(["kubectl", "version", "--client", "--output=json"], check=True, capture_output=True)
    version = json.loads(outcome.stdout)["clientVersion"]
    return int(version["major"]), int(version["minor"].rstrip("+"))


def documents(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def named(objects: list[dict], kind: str, name: str) -> dict:
    found = [thing for thing in objects if (thing["kind"], thing["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, f"{len(found)} {kind} {name}"
    return found[0]


class Schema(unittest.TestCase):
    def assert_valid(self, thing: dict):
        oldest = SINCE.get(thing["kind"], RELEASES[0])
        for release in (oldest, RELEASES[1]):
            with self.subTest(thing["kind"], name=thing["metadata"]["name"], kubernetes=release):
                kubernetes_validate.validate(thing, release, strict=True)

    def test_what_the_base_renders(self):
        objects = rendered()
        kinds = sorted(thing["kind"] for thing in objects)
        self.assertEqual(
            kinds,
            ["ClusterRole", "ClusterRoleBinding", "DaemonSet", "DaemonSet", "Namespace", "RuntimeClass", "ServiceAccount"],
        )
        for thing in objects:
            self.assert_valid(thing)

    def test_the_overlay_gives_the_base_an_image_and_a_configuration(self):
        if kubectl_release() < (1, 21):
            self.skipTest("SKIPPED: needs kubectl 1.21, whose kustomize takes a directory as a resource")
        objects = rendered("examples/overlay")
        for thing in objects:
            self.assert_valid(thing)
        (config_map,) = [thing for thing in objects if thing["kind"] == "ConfigMap"]
        install = named(objects, "DaemonSet", "mayu-install")["spec"]["template"]["spec"]
        self.assertEqual(config_map["metadata"]["namespace"], "mayu-system")
        (volume,) = [volume for volume in install["volumes"] if volume["name"] == "config"]
        self.assertEqual(volume["configMap"]["name"], config_map["metadata"]["name"])
        self.assertEqual(install["containers"][0]["image"], "registry.example.com/mayu-node:0.1.0")

    def test_what_is_applied_by_itself(self):
        for path in (KUBERNETES / "node-label-policy.yaml", KUBERNETES / "examples/pod.yaml", KUBERNETES / "examples/deployment.yaml"):
            for thing in documents(path):
                self.assert_valid(thing)

    def test_the_pod_of_the_knative_service(self):
        """Knative's schema is not at hand; what its template shares with a pod is checked as one."""
        (service,) = documents(KUBERNETES / "examples/knative-service.yaml")
        self.assertEqual(service["apiVersion"], "serving.knative.dev/v1")
        spec = service["spec"]["template"]["spec"]
        own = {"containerConcurrency", "timeoutSeconds"}
        pod = {key: value for key, value in spec.items() if key not in own}
        for container in pod["containers"]:
            container.setdefault("name", "user-container")
        self.assert_valid({"apiVersion": "v1", "kind": "Pod", "metadata": service["metadata"], "spec": pod})

    def test_a_wrong_field_is_found(self):
        broken = copy.deepcopy(named(rendered(), "DaemonSet", "mayu-install"))
        broken["spec"]["template"]["spec"]["hostPid"] = True
        with self.assertRaises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, RELEASES[1], strict=True)


class Fit(unittest.TestCase):
    def setUp(self):
        self.objects = rendered()
        self.runtime_class = named(self.objects, "RuntimeClass", "mayu")
        self.sets = {name: named(self.objects, "DaemonSet", f"mayu-{name}") for name in ("install", "remove")}
        self.pods = {name: thing["spec"]["template"]["spec"] for name, thing in self.sets.items()}

    def test_every_file_is_applied_by_the_base_or_named_in_the_documentation(self):
        base = set(yaml.safe_load((KUBERNETES / "base/kustomization.yaml").read_text())["resources"])
        self.assertEqual(base, {path.name for path in KUBERNETES.glob("base/*.yaml")} - {"kustomization.yaml"})
        text = (SOURCE / "docs/kubernetes.md").read_text()
        for path in [*KUBERNETES.glob("*.yaml"), *KUBERNETES.glob("examples/*")]:
            self.assertIn(str(path.relative_to(SOURCE)), text)

    def test_the_configuration_of_the_overlay_is_for_where_the_image_installs(self):
        config = tomllib.loads((KUBERNETES / "examples/overlay/config.toml").read_text())["vm"]
        with tempfile.TemporaryDirectory() as directory:
            installed = tomllib.loads((build_image(Path(directory)) / "root/etc/mayu/config.toml").read_text())["vm"]
        for key in ("vmm", "kernel", "image"):
            self.assertEqual(config[key], installed[key])
        self.assertEqual(set(config) - set(installed), set())

    def test_the_handler_is_the_one_that_containerd_gets(self):
        for file, plugin in (("containerd-1.toml", "io.containerd.grpc.v1.cri"), ("containerd-2.toml", "io.containerd.cri.v1.runtime")):
            config = tomllib.loads((SOURCE / "config" / file).read_text())
            runtimes = config["plugins"][plugin]["containerd"]["runtimes"]
            self.assertEqual(runtimes[self.runtime_class["handler"]]["runtime_type"], "io.containerd.mayu.v2")

    def test_pods_go_to_the_nodes_that_the_script_labels(self):
        script = (KUBERNETES / "image/mayu-node").read_text()
        self.assertEqual(self.runtime_class["scheduling"]["nodeSelector"], {"mayu.io/ready": "true"})
        self.assertIn("""label '"true"'""", script)
        self.assertIn("""{\\"mayu.io/ready\\":$1}""", script)

    def test_the_overhead_is_given(self):
        for resource in ("cpu", "memory"):
            self.assertRegex(self.runtime_class["overhead"]["podFixed"][resource], QUANTITY)

    def test_one_set_or_the_other_has_a_node_and_never_both(self):
        (term,) = self.pods["remove"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ]
        self.assertEqual(
            term["matchExpressions"],
            [
                {"key": "mayu.io/ready", "operator": "Exists"},
                {"key": "mayu.io/install", "operator": "NotIn", "values": ["true"]},
            ],
        )
        self.assertEqual(self.pods["install"]["nodeSelector"]["mayu.io/install"], "true")

    def test_the_containers_are_what_the_script_needs(self):
        for name, pod in self.pods.items():
            with self.subTest(name):
                (container,) = pod["containers"]
                self.assertTrue(pod["hostPID"])
                self.assertTrue(container["securityContext"]["privileged"])
                self.assertEqual(container["args"], [name])
                self.assertIn("NODE_NAME", [variable["name"] for variable in container["env"]])
                mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
                self.assertEqual(mounts["host"], "/host")
                self.assertEqual({volume["name"] for volume in pod["volumes"]}, set(mounts))
                done = container["readinessProbe"]["exec"]["command"][-1]
                self.assertIn(f"${{DONE_FILE:-{done}}}", (KUBERNETES / "image/mayu-node").read_text())
                labels = self.sets[name]["spec"]["template"]["metadata"]["labels"]
                self.assertEqual(self.sets[name]["spec"]["selector"]["matchLabels"], labels)

    def test_the_account_may_patch_nodes_and_nothing_else(self):
        role = named(self.objects, "ClusterRole", "mayu-node")
        self.assertEqual(role["rules"], [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["patch"]}])
        binding = named(self.objects, "ClusterRoleBinding", "mayu-node")
        self.assertEqual((binding["roleRef"]["kind"], binding["roleRef"]["name"]), ("ClusterRole", "mayu-node"))
        account = named(self.objects, "ServiceAccount", "mayu-node")["metadata"]
        self.assertEqual(
            binding["subjects"], [{"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}]
        )
        for pod in self.pods.values():
            self.assertEqual(pod["serviceAccountName"], account["name"])

    def test_the_namespace_takes_privileged_pods(self):
        namespace = named(self.objects, "Namespace", "mayu-system")
        self.assertEqual(namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "privileged")
        for thing in self.sets.values():
            self.assertEqual(thing["metadata"]["namespace"], "mayu-system")


class NodeLabelPolicy(unittest.TestCase):
    """The policy's expressions, evaluated as the API server does."""

    NODE = {"metadata": {"name": "node-1", "labels": {"zone": "a"}, "annotations": {"a": "b"}}, "spec": {"podCIDR": "10.0.0.0/24"}}
    ACCOUNT = "system:serviceaccount:mayu-system:mayu-node"

    def setUp(self):
        self.policy = named(documents(KUBERNETES / "node-label-policy.yaml"), "ValidatingAdmissionPolicy", "mayu-node-label")["spec"]

    def decide(self, after: dict, before: dict | None = None, account: str = ACCOUNT, nodes: list | None = None) -> str | None:
        """The message with which the policy denies; "" where it does not, None where it does not apply."""
        extra = {"authentication.kubernetes.io/node-name": ["node-1"] if nodes is None else nodes} if nodes != [] else {}
        context = {
            "request": {"userInfo": {"username": account, "extra": extra}},
            "object": after, "oldObject": before or self.NODE,
        }
        if not all(cel.evaluate(condition["expression"], context) for condition in self.policy["matchConditions"]):
            return None
        context["variables"] = {
            variable["name"]: cel.evaluate(variable["expression"], context) for variable in self.policy["variables"]
        }
        for validation in self.policy["validations"]:
            if not cel.evaluate(validation["expression"], context):
                return validation["message"]
        return ""

    def changed(self, part: str, **values) -> dict:
        node = copy.deepcopy(self.NODE)
        place = node if part == "spec" else node["metadata"]
        place[part] = place[part] | values
        return node

    def test_the_label_may_be_set_changed_and_removed(self):
        for before, after in ((None, "false"), ("false", "true"), ("true", None)):
            nodes = [self.changed("labels", **{"mayu.io/ready": value}) if value else self.NODE for value in (before, after)]
            self.assertEqual(self.decide(nodes[1], nodes[0]), "")

    def test_a_node_without_labels_may_get_its_first(self):
        bare = {"metadata": {"name": "node-1"}, "spec": {}}
        self.assertEqual(self.decide({"metadata": {"name": "node-1", "labels": {"mayu.io/ready": "false"}}, "spec": {}}, bare), "")

    def test_another_label_may_not_change(self):
        without = copy.deepcopy(self.NODE)
        del without["metadata"]["labels"]["zone"]
        for after in (self.changed("labels", zone="b"), self.changed("labels", other="c"), without):
            self.assertIn("no label but mayu.io/ready", self.decide(after))

    def test_nothing_else_may_change(self):
        for after in (self.changed("spec", unschedulable=True), self.changed("annotations", a="c")):
            self.assertIn("neither", self.decide(after))

    def test_another_node_may_not_change(self):
        other = copy.deepcopy(self.NODE)
        other["metadata"]["name"] = "node-2"
        self.assertIn("only change the node that it runs on", self.decide(other, other))

    def test_a_token_that_names_no_node_is_good_for_none(self):
        self.assertIn("only change the node that it runs on", self.decide(self.NODE, nodes=[]))

    def test_others_are_none_of_its_business(self):
        self.assertIsNone(self.decide(self.changed("spec", unschedulable=True), account="system:node:node-1"))
