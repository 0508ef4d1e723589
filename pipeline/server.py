"""The MLflow server with its pages: on loopback, or with accounts."""

import importlib.metadata
import importlib.util
import ipaddress
import logging
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import InputError
from pipeline.rundir import write_atomic
from pipeline.tracking import database_path, open_store, redacted

if TYPE_CHECKING:
    pass

log = logging.getLogger("gsa")


def serve(
    uri: str, artifacts: Path, host: str = "127.0.0.1", port: int = 5000
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of an MLflow server with its web pages on a local store.

    An address that others reach needs accounts: the extra `auth` and MLFLOW_AUTH_ADMIN_PASSWORD, which is
    the password of `admin` when the server first starts. Raises InputError: without them; a remote store.
    """
    database = database_path(uri)
    if database is None:
        raise InputError(f"{redacted(uri)} is a server already: open it in a browser")
    accounts = None if _is_loopback(host) else _accounts(database)
    open_store(uri, artifacts)  # its errors are one line; the server's are pages
    # What the user has exported for clients must not reach the server (security off, other stores).
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "_MLFLOW_"))}
    environment |= {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_MODEL_CATALOG_URI": "",  # else it asks the internet for a list of language models
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "40",  # with 5 + 10 about 15 requests at once lock it up
        "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "60",
        "PYTHONSAFEPATH": "1",  # a folder named mlflow where the user stands is not MLflow
    }
    store = f"sqlite:///{database}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    command += ["--registry-store-uri", store, "--artifacts-destination", artifacts.absolute().as_uri()]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    names = ["localhost", "127.0.0.1", "[[]::1]"]  # any port: an SSH tunnel may end at another one
    if accounts is not None:
        environment |= accounts
        others = sorted({_shown(host), socket.gethostname(), socket.getfqdn()})
        names += others
        command += ["--app-name", "basic-auth"]
        command += ["--cors-allowed-origins", ",".join(f"http://{name}:*" for name in others)]
    command += ["--allowed-hosts", ",".join(f"{name}:*" for name in names)]
    return command, environment


def ui_url(host: str, port: int, experiment_id: str) -> str:
    """The address of an experiment's table of runs (MLflow's own landing page is about language models)."""
    return f"http://{_shown(host)}:{port}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def _accounts(database: Path) -> dict[str, str]:
    password = os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", "")
    if len(password) < 12 or importlib.util.find_spec("flask_wtf") is None:
        raise InputError(
            "an address that others reach needs accounts: pip install 'gsa-networks[auth]', and export "
            "MLFLOW_AUTH_ADMIN_PASSWORD with 12 characters or more; or stay on 127.0.0.1 with an SSH tunnel"
        )
    accounts, settings = database.with_name("mlflow_auth.db"), database.with_name("mlflow_auth.ini")
    accounts.touch(mode=0o600)
    uri = f"sqlite:///{accounts}".replace("%", "%%")  # an ini file
    write_atomic(settings, f"[mlflow]\ndefault_permission=READ\ndatabase_uri={uri}\nadmin_username=admin\n")
    settings.chmod(0o600)
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(host: str) -> str:
    """A host as it stands in an address; the name of this machine for 'all interfaces'."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"[{name}]" if ":" in name else name
