"""MLflow's own REST application on a port of the loopback interface; prints the port.

`mlflow server` starts a second application for language models, which needs more packages than
the client brings along.
"""

import os
import sys

from werkzeug.serving import make_server


def main(folder: str) -> None:
    # What `mlflow server` sets before it imports its application.
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{folder}/mlflow.db"
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = f"{folder}/artifacts"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow.server import app

    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
