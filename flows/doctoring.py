"""All checks of `selftrain doctor`, in the order in which a run needs what they look at."""

from flows.checks import Check, checked
from flows.config import SelfTrainingConfig
from flows.machine_checks import check_devices, check_disks, check_limits, check_versions
from flows.prefect_checks import check_prefect
from flows.store_checks import check_credentials, check_data, check_store


def examine(config: SelfTrainingConfig | None, store: str | None) -> list[Check]:
    """Return what is found of everything that a run of a config needs.

    Args:
        config: None checks what no config is needed for.
        store: folder or URL; None: there is none to check.
    """
    found = checked(
        "versions", lambda: check_versions(config), remedy="Install selftrain into a new venv"
    )
    found += checked("devices", lambda: check_devices(config), remedy="Set device: cpu")
    found += checked(
        "disks", lambda: check_disks(config, store), remedy="Name folders that are there"
    )
    found += checked("open files", check_limits, remedy="Ask the system's administrator")
    found += checked(
        "credentials",
        lambda: check_credentials(config, store),
        remedy="Correct the profile or the environment variables AWS_*",
    )
    found += checked(
        "store", lambda: check_store(store), remedy="Correct --store, SELFTRAIN_STORE or `store`"
    )
    if config is not None:
        found += checked(
            "data", lambda: check_data(config), remedy="Correct the section `data` of the config"
        )
    found += checked("Prefect server", check_prefect, remedy="Correct PREFECT_API_URL, or unset it")
    return found
