"""The search service for `serve run` and `serve deploy`.

    serve run serve.app:app workdir=W serve.runtime=onnx_int8
    serve deploy serve/config.yaml

Arguments are settings, as on the jobs' command line without the dashes.
"""

import click
from ray.serve import Application

from acebert.config import load_settings
from acebert.errors import UserError
from acebert.serving.deployments import build


def app(arguments: dict[str, str]) -> Application:
    """The application by these settings.

    Raises:
        ClickException: what is wrong with them, or with the bundle; Serve's command line, which is
            click's, prints it without a traceback.
    """
    try:
        return build(load_settings([f"--{key}={value}" for key, value in arguments.items()]))
    except UserError as error:
        raise click.ClickException(str(error)) from error
