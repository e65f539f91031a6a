"""mayu-node, out of its image and on a made-up host."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

from host import Host
from project import Project, write

# After one of these, mayu-node only waits to be told to end.
LAST_LINES = ("mayu is installed", "mayu is removed", "not tried again")


def build_image(directory: Path) -> Path:
    """What scripts/node-image puts into the image, from a copy of the project; gives the folder /mayu."""
    project = Project(directory / "project")
    image = directory / "image"
    # A container engine that keeps what it is given.
    write(directory / "engine/docker", f'#!/bin/sh\n[ "$1" = build ] || exit 0\nfor context; do :; done\ncp -r "$context" {image}\n', 0o755)
    path = f"{directory / 'engine'}:{os.environ['PATH']}"
    project.run("scripts/node-image", "release", "mayu-node:test", PATH=path)
    return image


class Node(Host):
    """A host, and a container on it from the image of mayu-node."""

    def __init__(self, directory: Path, image: Path, version: str, files: dict[str, str]):
        super().__init__(directory, version, files)
        self.image = directory / "image"
        shutil.copytree(image, self.image)
        write(directory / "account/token", "secret")
        write(directory / "account/ca.crt", "")
        self.config_map, self.done_file = directory / "config.toml", directory / "done"
        self.was_done = False
        self.environment = os.environ | {
            "MADE_UP_CALLS": str(self.pipes), "PATH": f"{self.programs}:{os.environ['PATH']}",
            "HOST": str(self.root), "CONFIG": str(self.config_map), "POLL": "0.01", "CONTAINERD_TIMEOUT": "1",
            "SERVICE_ACCOUNT": str(directory / "account"), "DONE_FILE": str(self.done_file),
            "NODE_NAME": "node-1", "POD_UID": "0001-ab",
            "KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443",
        }

    def start(self, mode: str) -> subprocess.Popen:
        return subprocess.Popen(
            [self.image / "mayu-node", mode], env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )

    def read_until(self, process: subprocess.Popen, text: str) -> str:
        """Reads its output up to the line with this text."""
        log = ""
        for line in process.stdout:
            log += line
            if text in line:
                return log
        raise AssertionError(f"it ended without '{text}':\n{log}")

    def finish(self, process: subprocess.Popen, log: str = "") -> tuple[int, str]:
        """Lets it come to its end, or to where it waits to be told to; gives status and output."""
        with process:
            for line in process.stdout:
                log += line
                if any(last in line for last in LAST_LINES):
                    # The file is made right after the line.
                    while "error:" not in log and not self.done_file.exists() and process.poll() is None:
                        pass
                    self.was_done = self.done_file.exists()
                    process.send_signal(signal.SIGTERM)
        return process.returncode, log

    def run(self, mode: str) -> tuple[int, str]:
        self.was_done = False
        return self.finish(self.start(mode))
