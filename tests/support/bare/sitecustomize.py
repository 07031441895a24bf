"""With this folder in PYTHONPATH, a machine where nothing is installed beyond torch, transformers, numpy and what these
bring: for our own files nothing else is there. Other libraries may use what they find.
"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[3])
WITHOUT = {"grpc", "google", "msgspec", "zmq", "pydantic", "pydantic_settings", "prometheus_client", "uvloop", "rich"}


class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in WITHOUT:
            return
        who = sys._getframe(1)
        while "importlib" in who.f_code.co_filename:
            who = who.f_back
        if who.f_code.co_filename.startswith(ROOT) and "site-packages" not in who.f_code.co_filename:
            raise ImportError(f"{name} is not there, on a bare machine")


sys.meta_path.insert(0, Nothing())
