"""`igpt` commands in processes that are forked from one that has imported everything.

    python preloaded.py serve SOCKET      # until it is terminated
    python preloaded.py run SOCKET WORDS  # as `igpt WORDS`, with this process's folder and output

Importing torch takes seconds of processor time per command, which a test with dozens of commands
would spend again and again.
"""

import os
import signal
import socket
import sys
import traceback
from pathlib import Path


def serve(path: str) -> None:
    import igpt.cli
    import igpt.evaluation.probe
    import igpt.sampling.grids
    import igpt.training.finetune
    import igpt.training.pretrain  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended commands leave nothing behind
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen()
        Path(f"{path}.new").rename(path)  # clients wait for this name
        while True:
            client, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(client)
            client.close()


def answer(client: socket.socket) -> None:
    """Run one command in this process and send its exit code; never return."""
    message, descriptors, _, _ = socket.recv_fds(client, 2**16, 3)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    folder, *words = message.decode().split("\0")
    os.chdir(folder)
    sys.argv = ["igpt", *words]
    code = 1
    try:
        from igpt.__main__ import main

        code = main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        client.send(bytes([code]))
        os._exit(code)


def run(path: str, words: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, ["\0".join([str(Path.cwd()), *words]).encode()], [0, 1, 2])
        return (server.recv(1) or b"\1")[0]


if __name__ == "__main__":
    action, path, *rest = sys.argv[1:]
    if action == "serve":
        serve(path)
    sys.exit(run(path, rest))
