"""The search service for `serve run` and `serve deploy`.

    serve run serve.app:app workdir=W serve.runtime=onnx_int8
    serve deploy serve/config.yaml

Arguments are settings, as on the jobs' command line without the dashes.
"""

from ray.serve import Application

from acebert.config import load_settings
from acebert.serving.deployments import build


def app(arguments: dict[str, str]) -> Application:
    """The application by these settings."""
    return build(load_settings([f"--{key}={value}" for key, value in arguments.items()]))
