"""Runs in a container: what data costs through its network and its files. Prints a line a figure: what|microseconds."""

import io
import os
import socket
import tarfile
import time

# One that takes everything, and one that sends 64 MiB.
SINK = ("192.168.99.1", 5001)
SOURCE = ("192.168.99.1", 5002)
MIB = 1 << 20


def timed(what, work):
    started = time.monotonic()
    work()
    print(f"{what}|{(time.monotonic() - started) * 1_000_000:.0f}", flush=True)


def send():
    with socket.create_connection(SINK) as connection:
        for _ in range(64):
            connection.sendall(bytes(MIB))
        connection.shutdown(socket.SHUT_WR)
        # Its end is when everything has arrived.
        connection.recv(1)


def receive():
    with socket.create_connection(SOURCE) as connection:
        while connection.recv(MIB):
            pass


def archive():
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for directory in range(100):
            for name in range(100):
                member = tarfile.TarInfo(f"tree/{directory}/{name}")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))
    return packed.getvalue()


def unpack(packed):
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall("/volume", filter="data")


def find():
    count = sum(len(files) for _, _, files in os.walk("/volume/tree"))
    assert count == 10_000, count


def stat():
    for directory in range(100):
        for name in range(100):
            os.stat(f"/volume/tree/{directory}/{name}")


def remove():
    for directory, _, files in os.walk("/volume/tree", topdown=False):
        for name in files:
            os.unlink(os.path.join(directory, name))
        os.rmdir(directory)


def write(size, count):
    def work():
        descriptor = os.open("/volume/file", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for _ in range(count):
            os.write(descriptor, bytes(size))
        os.close(descriptor)

    return work


def read(size):
    def work():
        descriptor = os.open("/volume/file", os.O_RDONLY)
        while os.read(descriptor, size):
            pass
        os.close(descriptor)

    return work


timed("TCP to the host, 64 MiB", send)
timed("TCP from the host, 64 MiB", receive)
packed = archive()
timed("10,000 files unpacked into a volume", lambda: unpack(packed))
timed("10,000 files found", find)
timed("10,000 files looked at", stat)
timed("10,000 files removed", remove)
timed("32 MiB written to a volume by 1 MiB", write(MIB, 32))
timed("32 MiB read by 1 MiB", read(MIB))
timed("4 MiB written to a volume by 4 KiB", write(4096, 1024))
timed("4 MiB read by 4 KiB", read(4096))
