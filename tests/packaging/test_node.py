"""mayu-node: what the DaemonSets run."""

import fcntl
import subprocess
import tempfile
import unittest
from pathlib import Path

from host import CONFIG
from node import Node, build_image
from project import write

HANDLER = "io.containerd.mayu.v2"
DROP_IN = "etc/containerd/conf.d/mayu.toml"

# Configurations that are found on nodes. runc's SystemdCgroup is what a node misses most when it is lost.
OLD = """\
version = 2

# Ours: do not lose this comment.
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.9"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = true
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.nvidia]
      runtime_type = "io.containerd.runc.v2"
"""
NEW = OLD.replace("version = 2", "version = 3").replace("grpc.v1.cri", "cri.v1.runtime")
IMPORTS = 'imports = ["/etc/containerd/conf.d/*.toml"]\n'
BY_HAND = f'[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.mayu]\nruntime_type = "{HANDLER}"\n'


class NodeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.directory = Path(directory.name)
        cls.image = build_image(cls.directory)

    def node(self, version: str = "2.1.9", files: dict | None = None) -> Node:
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        return Node(directory, self.image, version, {CONFIG: NEW} if files is None else files)

    def install(self, node: Node) -> str:
        status, log = node.run("install")
        self.assertEqual(status, 0, log)
        self.assertTrue(node.was_done, log)
        return log

    def remove(self, node: Node) -> str:
        status, log = node.run("remove")
        self.assertEqual(status, 0, log)
        return log

    def failure(self, node: Node, waits: bool = False) -> str:
        """Its installation fails; `waits` if it is not to be tried again at once."""
        status, log = node.run("install")
        self.assertEqual(status, 1, log)
        self.assertIn("error:", log)
        self.assertEqual("not tried again" in log, waits, log)
        self.assertFalse(node.was_done)
        return log


class Configuration(NodeTest):
    """The handler comes into containerd's configuration and out of it again."""

    def comes_and_goes(self, version: str, files: dict[str, str], place: str) -> Node:
        """On a node with these files the handler goes to this place, and is all that changes. What was there is back,
        byte by byte, when it is gone."""
        node = self.node(version, files)
        before, runtimes = node.files(), node.runtimes()

        self.install(node)
        self.assertTrue(node.cri_is_loaded())
        self.assertEqual(node.runtimes()["mayu"]["runtime_type"], HANDLER)
        self.assertEqual({name: what for name, what in node.runtimes().items() if name != "mayu"}, runtimes)
        self.assertIn(HANDLER, str(node.parsed(place)))
        self.assertEqual((node.root / DROP_IN).exists(), place == DROP_IN)
        for path, text in files.items():
            self.assertTrue(node.read(path).startswith(text))

        installed = node.files()
        node.calls.clear()
        self.install(node)
        self.assertEqual(node.files(), installed)
        self.assertNotIn("restart", node.calls)

        self.remove(node)
        self.assertEqual(node.files(), before)
        self.assertEqual(node.runtimes(), runtimes)
        return node

    def test_1_7_without_a_file(self):
        self.comes_and_goes("1.7.24", {}, CONFIG)

    def test_1_7_with_a_file_that_says_nothing_of_cri(self):
        self.comes_and_goes("1.7.24", {CONFIG: "version = 2\noom_score = -999\n"}, CONFIG)

    def test_1_7_with_cri_but_no_runtimes(self):
        text = 'version = 2\n[plugins."io.containerd.grpc.v1.cri"]\nsandbox_image = "registry.k8s.io/pause:3.9"\n'
        self.comes_and_goes("1.7.24", {CONFIG: text}, CONFIG)

    def test_1_7_with_runtimes(self):
        self.comes_and_goes("1.7.24", {CONFIG: OLD}, CONFIG)

    def test_1_7_with_no_line_break_at_the_end(self):
        self.comes_and_goes("1.7.24", {CONFIG: OLD.rstrip()}, CONFIG)

    def test_1_7_that_imports_drop_ins_gets_none_that_would_displace_the_other_runtimes(self):
        others = {"etc/containerd/conf.d/log.toml": "version = 2\noom_score = -1\n"}
        self.comes_and_goes("1.7.24", {CONFIG: IMPORTS + OLD} | others, CONFIG)

    def test_1_7_with_the_runtimes_in_a_drop_in_cannot_have_the_handler(self):
        files = {CONFIG: f"version = 2\n{IMPORTS}", "etc/containerd/conf.d/cri.toml": OLD}
        node = self.node("1.7.24", files)
        before, runtimes = node.files(), node.runtimes()
        self.assertIn("by hand", self.failure(node))
        self.assertEqual({path: node.files()[path] for path in before}, before)
        self.assertEqual(node.runtimes(), runtimes)

    def test_2_1_without_a_file(self):
        self.comes_and_goes("2.1.9", {}, CONFIG)

    def test_2_1_with_version_3(self):
        self.comes_and_goes("2.1.9", {CONFIG: NEW}, CONFIG)

    def test_2_1_with_version_3_that_imports_drop_ins(self):
        self.comes_and_goes("2.1.9", {CONFIG: IMPORTS + NEW}, DROP_IN)

    def test_2_1_with_version_2(self):
        self.comes_and_goes("2.1.9", {CONFIG: OLD}, CONFIG)

    def test_2_1_with_version_2_gets_no_drop_in_of_version_3_which_would_displace_all_of_cri(self):
        node = self.comes_and_goes("2.1.9", {CONFIG: IMPORTS + OLD}, DROP_IN)
        write(node.root / DROP_IN, f"version = 3\n{BY_HAND}")
        self.assertNotIn("SystemdCgroup = true", node.settings(f"/{CONFIG}"), "the danger is gone: is the test still needed?")

    def test_2_1_that_imports_other_drop_ins(self):
        files = {CONFIG: f'imports = ["other/*.toml"]\n{NEW}', "etc/containerd/other/a.toml": "version = 3\n"}
        self.comes_and_goes("2.1.9", files, CONFIG)

    def test_2_2_without_a_file(self):
        self.comes_and_goes("2.2.0", {}, DROP_IN)

    def test_2_2_without_a_file_but_with_a_drop_in(self):
        self.comes_and_goes("2.2.0", {"etc/containerd/conf.d/cri.toml": NEW}, DROP_IN)

    def test_the_mode_of_the_file_stays(self):
        node = self.node()
        (node.root / CONFIG).chmod(0o600)
        for step in (self.install, self.remove):
            step(node)
            self.assertEqual((node.root / CONFIG).stat().st_mode & 0o777, 0o600)

    def test_what_is_written_behind_the_block_survives_it(self):
        for files in ({CONFIG: NEW}, {}):
            with self.subTest(files=files):
                node = self.node("2.1.9", files)
                self.install(node)
                added = '\n[plugins."io.containerd.cri.v1.images"]\nsnapshotter = "native"\n'
                with (node.root / CONFIG).open("a") as config:
                    config.write(added)
                self.remove(node)
                self.assertTrue(node.read(CONFIG).endswith(added))
                self.assertEqual(node.parsed(CONFIG)["version"], 3)
                self.assertNotIn("mayu", node.read(CONFIG))

    def test_a_handler_that_somebody_else_has_put_there_is_left_alone(self):
        node = self.node("2.1.9", {CONFIG: NEW + BY_HAND})
        self.install(node)
        self.remove(node)
        self.assertEqual(node.read(CONFIG), NEW + BY_HAND)
        self.assertNotIn("restart", node.calls)

    def test_a_drop_in_of_that_name_by_somebody_else_is_left_alone(self):
        by_hand = f"version = 3\n{BY_HAND}"
        for text in (IMPORTS + NEW, NEW):
            with self.subTest("read" if text.startswith("imports") else "not read"):
                node = self.node("2.1.9", {CONFIG: text, DROP_IN: by_hand})
                before = node.files()
                self.install(node)
                self.assertEqual(node.read(DROP_IN), by_hand)
                self.assertEqual(node.runtimes()["mayu"]["runtime_type"], HANDLER)
                self.remove(node)
                self.assertEqual(node.files(), before)

    def test_the_handler_of_an_earlier_version_of_mayu_is_replaced(self):
        for text, place in ((NEW, CONFIG), (IMPORTS + NEW, DROP_IN)):
            with self.subTest(place):
                node = self.node("2.1.9", {CONFIG: text})
                self.install(node)
                installed = node.files()
                write(node.root / place, node.read(place).replace("privileged_without_host_devices = true\n", ""))
                self.assertNotEqual(node.files(), installed)
                node.calls.clear()
                self.install(node)
                self.assertEqual(node.files(), installed)
                self.assertEqual(node.calls.count("restart"), 1)

    def test_an_upgrade_of_containerd_keeps_the_handler(self):
        node = self.node("1.7.24", {CONFIG: OLD})
        self.install(node)
        node.version = "2.1.9"
        node.restart_containerd()
        node.calls.clear()
        self.install(node)
        self.assertNotIn("restart", node.calls)
        self.assertEqual(node.runtimes()["mayu"]["runtime_type"], HANDLER)


class Refusals(NodeTest):
    """Where mayu-node does not even begin, the node is as it was."""

    def refuses(self, node: Node, reason: str):
        before = node.files()
        self.assertIn(reason, self.failure(node))
        self.assertEqual(node.files(), before)
        self.assertEqual(node.calls, [])

    def test_an_old_containerd(self):
        self.refuses(self.node("1.6.20", {}), "containerd is 1.6; mayu needs 1.7 or 2.x")

    def test_a_containerd_of_the_future(self):
        node = self.node()
        node.version = "3.0.0"
        self.refuses(node, "containerd is 3.0; mayu needs 1.7 or 2.x")

    def test_a_containerd_that_does_not_tell_its_version(self):
        node = self.node()
        node.version = "2-devel"
        self.refuses(node, "cannot tell the version of containerd")

    def test_a_cri_plugin_that_does_not_run(self):
        node = self.node()
        node.troubles.add("CRI error")
        self.refuses(node, "CRI plugin is not loaded")

    def test_a_configuration_that_is_a_symbolic_link(self):
        node = self.node()
        (node.root / CONFIG).rename(node.root / "etc/elsewhere.toml")
        (node.root / CONFIG).symlink_to("../elsewhere.toml")
        self.refuses(node, "is a symbolic link")


class Failures(NodeTest):
    """Where something goes wrong later, containerd runs as before."""

    def assert_containerd_is_untouched(self, node: Node, before: dict):
        ours = {path for path in node.files() if "mayu" in path and "containerd/conf.d" not in path} | {
            "usr/local/lib", "usr/local/lib/systemd", "usr/local/lib/systemd/system", "usr/local/libexec",
            "usr/local/share", "usr/local/share/doc",
        }
        self.assertEqual({path: data for path, data in node.files().items() if path not in ours}, before)
        self.assertTrue(node.cri_is_loaded())
        self.assertNotIn("mayu", node.runtimes())
        self.assertNotIn("label true", node.calls)
        self.assertFalse((node.root / "run/mayu-node").exists())

    def test_a_node_without_kvm(self):
        node = self.node()
        before = node.files()
        node.troubles.add("no KVM")
        self.assertIn("/dev/kvm is missing", self.failure(node))
        self.assert_containerd_is_untouched(node, before)
        self.assertNotIn("restart", node.calls)

    def test_a_configuration_to_which_nothing_can_be_added(self):
        inline = (
            'version = 3\n[plugins."io.containerd.cri.v1.runtime"]\n'
            'containerd = { runtimes = { runc = { runtime_type = "io.containerd.runc.v2" } } }\n'
        )
        node = self.node("2.1.9", {CONFIG: inline})
        before = node.files()
        self.assertIn("by hand", self.failure(node))
        self.assert_containerd_is_untouched(node, before)
        self.assertNotIn("restart", node.calls)

    def test_another_runtime_of_that_name(self):
        text = NEW + BY_HAND.replace(HANDLER, "io.containerd.other.v2")
        node = self.node("2.1.9", {CONFIG: text})
        self.assertIn("by hand", self.failure(node))
        self.assertEqual(node.read(CONFIG), text)
        self.assertNotIn("restart", node.calls)

    def test_configuration_version_1(self):
        node = self.node("1.7.24", {CONFIG: "oom_score = 0\n"})
        before = node.files()
        self.assertIn("config migrate", self.failure(node))
        self.assert_containerd_is_untouched(node, before)

    def test_a_containerd_that_does_not_start_gets_its_old_configuration_back(self):
        places = (("1.7.24", {CONFIG: OLD}), ("2.1.9", {CONFIG: IMPORTS + NEW}), ("2.1.9", {}), ("2.2.0", {}))
        for trouble in ("dies with handler", "CRI error with handler"):
            for version, files in places:
                with self.subTest(trouble, version=version, files=files):
                    node = self.node(version, files)
                    before = node.files()
                    node.troubles.add(trouble)
                    self.assertIn("it runs with the old one", self.failure(node, waits=True))
                    self.assert_containerd_is_untouched(node, before)
                    self.assertEqual(node.calls.count("restart"), 2)

    def test_a_containerd_that_does_not_start_at_all(self):
        node = self.node()
        node.troubles.add("dies")
        self.assertIn("does not come back with its old configuration either", self.failure(node, waits=True))
        self.assertEqual(node.read(CONFIG), NEW)

    def kill_before_restart(self, node: Node):
        """As a run leaves it that is killed after it has changed the files and before it has restarted containerd."""
        self.install(node)
        write(node.root / "run/mayu-node/config.toml", NEW)
        node.calls.clear()

    def test_what_a_killed_run_has_begun_is_finished_by_the_next(self):
        node = self.node()
        self.kill_before_restart(node)
        self.install(node)
        self.assertEqual(node.calls.count("restart"), 1)
        self.assertFalse((node.root / "run/mayu-node").exists())

    def test_what_a_killed_run_has_begun_is_taken_back_where_containerd_does_not_start(self):
        node = self.node()
        before = node.files()
        self.kill_before_restart(node)
        node.troubles.add("dies with handler")
        self.failure(node, waits=True)
        self.assert_containerd_is_untouched(node, before)

    def test_a_test_pod_that_does_not_run_leaves_the_node_unready_until_one_does(self):
        for trouble, reason in (("no test pod", "the guest did not start"), ("host kernel", "the host's own kernel")):
            with self.subTest(trouble):
                node = self.node()
                node.troubles.add(trouble)
                self.assertIn(reason, self.failure(node))
                self.assertNotIn("label true", node.calls)
                node.troubles.clear()
                self.install(node)
                self.assertEqual(node.calls[-1], "label true")

    def test_a_label_that_cannot_be_set(self):
        node = self.node()
        before = node.files()
        node.troubles.add("API down")
        self.assertIn("does not let node node-1 be labelled", self.failure(node))
        self.assert_containerd_is_untouched(node, before)


class Steps(NodeTest):
    def test_the_order_of_an_installation(self):
        node = self.node()
        log = self.install(node)
        steps = ["label false", "mayu check --no-cri", "restart", "mayu check", "run mayu-node-test uname -r", "label true"]
        self.assertEqual(node.calls, steps)
        self.assertIn("a test pod ran on its own kernel, 6.12.1-mayu", log)

    def test_the_order_of_a_removal(self):
        node = self.node()
        self.install(node)
        node.calls.clear()
        self.remove(node)
        self.assertEqual(node.calls, ["label false", "restart", "label None"])

    def test_a_pod_that_containerd_does_not_know_is_no_test_pod(self):
        node = self.node()
        node.environment["POD_UID"] = ""
        self.assertIn("no test pod", self.install(node))
        self.assertEqual(node.calls[-1], "label true")

    def test_removing_where_nothing_is_installed_only_takes_the_label_away(self):
        node = self.node()
        before = node.files()
        self.remove(node)
        self.assertEqual(node.files(), before)
        self.assertEqual(node.calls, ["label false", "label None"])

    def test_removing_waits_for_the_last_pod(self):
        node = self.node()
        self.install(node)
        installed = node.files()
        pod = node.start_pod()
        process = node.start("remove")
        log = node.read_until(process, "waiting for 1 pods")
        self.assertEqual(node.files(), installed)
        pod.unlink()
        status, log = node.finish(process, log)
        self.assertEqual(status, 0, log)
        self.assertNotIn("mayu", node.runtimes())
        self.assertFalse((node.root / "usr/local/bin/mayu").exists())

    def test_removing_can_be_ended_while_it_waits(self):
        node = self.node()
        self.install(node)
        node.start_pod()
        process = node.start("remove")
        node.read_until(process, "waiting for 1 pods")
        process.terminate()
        status, log = node.finish(process)
        self.assertEqual(status, 0, log)
        self.assertIn("mayu", node.runtimes())

    def test_an_upgrade_replaces_the_files_and_leaves_containerd_alone(self):
        node = self.node()
        self.install(node)
        node.calls.clear()
        vmm = "usr/local/libexec/mayu/mayu-vmm"
        with (node.root / vmm).open() as running:
            write(node.image / "root" / vmm, "vmm second\n", 0o755)
            self.install(node)
            self.assertEqual(running.read(), "vmm first\n")
        self.assertEqual(node.read(vmm), "vmm second\n")
        self.assertNotIn("restart", node.calls)

    def test_the_configuration_of_the_cluster_becomes_that_of_the_node(self):
        node = self.node()
        before = node.files()
        for memory in (512, 1024):
            default = (self.image / "root/etc/mayu/config.toml").read_text()
            write(node.config_map, default.replace("memory_mib = 256", f"memory_mib = {memory}"))
            self.install(node)
            self.assertEqual(node.parsed("etc/mayu/config.toml")["vm"]["memory_mib"], memory)
        self.remove(node)
        self.assertEqual(node.files(), before)

    def test_a_configuration_that_was_edited_on_the_node_stays(self):
        node = self.node()
        self.install(node)
        with (node.root / "etc/mayu/config.toml").open("a") as config:
            config.write("# mine\n")
        self.assertIn("kept /etc/mayu/config.toml", self.install(node))
        self.remove(node)
        self.assertTrue(node.read("etc/mayu/config.toml").endswith("# mine\n"))

    def test_one_that_removes_waits_for_one_that_installs(self):
        node = self.node()
        with (node.root / "run/mayu-node.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            process = node.start("remove")
            with self.assertRaises(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)
            self.assertEqual(node.calls, [])
        status, log = node.finish(process)
        self.assertEqual(status, 0, log)
        self.assertIn("label None", node.calls)

    def test_other_words_are_refused(self):
        node = self.node()
        for word in ("", "purge"):
            status, log = node.run(word)
            self.assertEqual(status, 2)
            self.assertIn("usage: mayu-node install|remove", log)
