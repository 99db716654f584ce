"""What a person sees of a run in the Prefect UI, in headless Chromium on a real server.

Prefect 3.8.8 has two versions of its UI: `/v2`, which a browser without a preference is led to, and
the one before, which the addresses that Prefect prints lead to. Pages to look at are checked in
both, forms in the newer one. `docs/images/screenshots.py` makes the pictures of the README.
"""

import io
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

from flows.approving import ApprovalForm
from flows.config import SelfTrainingConfig
from flows.deploying import Pools, deploy, run_parameters
from flows.loading import parse_config
from flows.self_training import self_training
from flows.server import wait_until_recorded
from storage.store import Store, open_store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
Page = Any  # of playwright, which is imported only where it is installed

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

NAME = "watched"
UI_VERSIONS = pytest.mark.parametrize("version", ["", "/v2"], ids=["v1", "v2"])
_TIMEOUT_MS = 30_000


@dataclass(frozen=True)
class Shown:
    """A run that asks a person, its deployments, and the same run once more, all of it reused."""

    url: str
    store: Store
    store_url: str
    config: SelfTrainingConfig
    flow_run_id: str
    again_id: str
    deployments: dict[str, str]


@pytest.fixture(scope="module")
def shown(
    prefect_api: str,
    trained_here: list[str],
    tiny_config: Callable[..., SelfTrainingConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("shown") / "store"
    folder.mkdir()
    config = tiny_config(folder, "rounds=1", "baseline=false", "approve=promotion", name=NAME)
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as web,
        pytest.MonkeyPatch.context() as patch,
    ):
        threading.Thread(target=web.serve_forever, daemon=True).start()
        store_url = f"http://127.0.0.1:{web.server_port}"
        patch.setenv("SELFTRAIN_STORE_WEB_URL", store_url)
        deployed = deploy(config, Pools("gpu", "cpu"), with_automations=False)
        ids: list[str] = []
        for _ in range(2):
            state = self_training(config, return_state=True)
            ids.append(str(state.state_details.flow_run_id))
            assert wait_until_recorded(ids[-1], at_least=9)
        yield Shown(
            url=prefect_api.removesuffix("/api"),
            store=open_store(str(folder)),
            store_url=store_url,
            config=config,
            flow_run_id=ids[0],
            again_id=ids[1],
            deployments={one["name"]: one["id"] for one in deployed.deployments},
        )
        web.shutdown()


@pytest.fixture(scope="module")
def browser(shown: Shown) -> Iterator[Any]:
    # After the runs: playwright's loop, which goes on beside this thread, is none for flows.
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    # Nothing but this machine is needed, and nothing else is asked (docs/operations.md).
    local = re.compile(r"^https?://127\.0\.0\.1[:/]")
    context.route(lambda url: local.match(url) is None, lambda route: route.abort())
    context.set_default_timeout(_TIMEOUT_MS)
    playwright.expect.set_options(timeout=_TIMEOUT_MS)
    yield context.new_page()
    context.close()


def fits(page: Page) -> bool:
    """Whether the page is not wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@UI_VERSIONS
def test_the_runs_page_tells_what_ran_and_how_it_ended(
    page: Page, shown: Shown, version: str
) -> None:
    page.goto(f"{shown.url}{version}/runs")

    body = page.locator("body")
    for text in (NAME, "round 1 · label", "round 1 · select", "round-1", "WaitingForApproval"):
        expect(body).to_contain_text(text)
    assert fits(page)


@UI_VERSIONS
def test_the_graph_of_a_run_has_its_stages_and_the_list_says_which_were_reused(
    page: Page, shown: Shown, version: str
) -> None:
    with page.expect_response(re.compile(rf"{shown.again_id}/graph-v2")) as answer:
        page.goto(f"{shown.url}{version}/runs/flow-run/{shown.again_id}")

    # The graph is painted, so its words are those of the page's own source.
    labels = {node["label"] for _, node in answer.value.json()["nodes"]}
    assert {
        "round 0 · teacher (small_cnn-4x1)",
        "round 0 · validate",
        "label / round 1 · label",
        "select / round 1 · select",
        "round 1 · student (small_cnn-4x1)",
        "round 1 · promote",
    } <= labels
    canvas = page.locator("canvas").first
    expect(canvas).to_be_visible()
    page.get_by_text("Task Runs", exact=True).first.click()
    expect(page.locator("body")).to_contain_text("round 1 · student (small_cnn-4x1)")
    expect(page.get_by_text("Reused", exact=True).first).to_be_visible()
    assert _num_green(canvas.screenshot()) > 200, "a bar for each stage"
    assert fits(page)


@UI_VERSIONS
def test_results_are_a_table_that_fits_with_links_that_open_the_report(
    page: Page, shown: Shown, version: str
) -> None:
    open_artifact(page, shown, version, f"results-{NAME}")

    table = page.locator("table").first
    expect(table).to_contain_text("test accuracy")
    expect(table.locator("tr")).to_have_count(3)  # header, round 0, round 1
    expect(table).to_contain_text("small_cnn-4x1")
    expect(table).not_to_contain_text("<br>")
    assert table.evaluate("one => one.scrollWidth <= one.parentElement.clientWidth")
    expect(page.locator("pre")).to_contain_text("report.html")
    with page.expect_popup() if version == "" else page.expect_navigation() as opened:
        page.get_by_role("link", name="report", exact=True).click()
    report = opened.value if version == "" else page
    expect(report.get_by_role("heading", level=1)).to_contain_text(NAME)
    assert report.url == f"{shown.store_url}/runs/{NAME}/report.html"


@UI_VERSIONS
@pytest.mark.parametrize("name", ["confidence", "classes"])
def test_figures_of_the_selection_are_seen(
    page: Page, shown: Shown, version: str, name: str
) -> None:
    open_artifact(page, shown, version, f"{name}-{NAME}")

    figure = page.locator("img[src^='data:image/png']").first
    expect(figure).to_be_visible()
    assert figure.evaluate("one => one.naturalWidth") > 500
    assert figure.get_attribute("alt")
    expect(page.get_by_text("Image URL")).to_have_count(0)  # written out, it is pages long
    assert fits(page)


@UI_VERSIONS
def test_progress_tells_how_far_and_how_fast(page: Page, shown: Shown, version: str) -> None:
    open_artifact(page, shown, version, f"progress-{NAME}-r1-student")

    body = page.locator("body")
    expect(body).to_contain_text("round 1 · student: 12 of 12 steps, loss ")
    expect(body).to_contain_text("last dev accuracy")
    expect(body).to_contain_text("Progress: 100%")


def test_a_custom_run_is_a_form_of_the_config_that_says_what_is_wrong(
    page: Page, shown: Shown
) -> None:
    deployment = shown.deployments[f"self-training/{NAME}"]
    open_form(page, shown, deployment)

    name, rounds = field(page, "Name"), field(page, "Rounds (Optional)")
    expect(name).to_have_value(NAME)
    expect(rounds).to_have_value("1")
    for text in (
        "Students trained after the teacher; 0: the teacher alone, on labels.",
        "How sure a prediction must be to be kept.",
        "Affine (Optional)",
    ):
        expect(page.get_by_text(text, exact=True).first).to_be_attached()
    for choice in ("shards", "digits", "latest_promoted", "efficientnet_v2", "airbench"):
        expect(page.get_by_role("tab", name=choice, exact=True).first).to_be_attached()
    expect(page.get_by_text("Field (Optional)", exact=True)).to_have_count(0)
    assert fits(page), "fields are cut off on the right"

    rounds.fill("-1")
    submit(page)
    message = rounds.evaluate("one => one.validationMessage")
    assert "greater than or equal to 0" in message
    rounds.fill("2")
    name.fill("Not a name")
    submit(page)
    expect(page.get_by_text("'Not a name' does not match").first).to_be_visible()
    assert scheduled(deployment) == []

    # Anew, since a form that was refused is not sent again (Prefect 3.8.8).
    open_form(page, shown, deployment)
    expect(name).to_have_value(NAME)  # before that, what is filled in may be lost
    rounds.fill("2")
    name.fill("by-hand")
    submit(page)
    page.wait_for_url(lambda url: not url.endswith("/run"))
    (parameters,) = scheduled(deployment)
    assert parse_config(parameters["config"], where="form") == parse_config(
        run_parameters(shown.config)["config"] | {"name": "by-hand", "rounds": 2}, where="test"
    )


def test_the_form_of_an_approval_is_filled_in_but_for_the_answer(page: Page, shown: Shown) -> None:
    deployment = shown.deployments[f"approve/{NAME}"]
    open_form(page, shown, deployment)

    expect(field(page, "Run")).to_have_value(NAME)
    expect(page.get_by_text("Who answers; kept in the store.")).to_be_visible()
    field(page, "By").fill("ada@lab")
    field(page, "Comment (Optional)").fill("balanced enough")
    page.get_by_role("button", name="Select Answer").click()
    expect(page.get_by_role("option")).to_have_text(["accept", "reject"])
    page.get_by_role("option", name="accept").click()
    submit(page)
    page.wait_for_url(lambda url: not url.endswith("/run"))

    (parameters,) = scheduled(deployment)
    form = ApprovalForm(**parameters["form"])
    assert (form.run, form.answer, form.by) == (NAME, "accept", "ada@lab")
    assert (form.comment, form.threshold, form.store) == ("balanced enough", None, shown.store.url)


def test_the_report_is_as_narrow_as_a_telephone_or_a_sheet_of_paper(
    page: Page, shown: Shown
) -> None:
    for width, media in ((390, "screen"), (688, "print")):  # A4 without its margins
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(media=media)
        page.goto(f"{shown.store_url}/runs/{NAME}/report.html")
        expect(page.locator("svg.figure").first).to_be_visible()
        assert fits(page), media


def open_artifact(page: Page, shown: Shown, version: str, key: str) -> None:
    """Go to the newest artifact of a key.

    From the page of the key: the one of all artifacts is in no order, and its first version has
    only those in the window.
    """
    page.goto(f"{shown.url}{version}/artifacts/key/{key}")
    link = page.locator("a[href*='/artifacts/artifact/']").first
    # Its address and no click, which is lost where the page draws its list anew at that moment.
    page.goto(link.evaluate("one => one.href"))


def open_form(page: Page, shown: Shown, deployment: str) -> None:
    page.goto(f"{shown.url}/v2/deployments/deployment/{deployment}/run")
    page.get_by_role("button", name="Submit").wait_for()


def field(page: Page, label: str) -> Any:
    return page.get_by_label(label, exact=True).first


def submit(page: Page) -> None:
    page.get_by_role("button", name="Submit").click()


def scheduled(deployment: str) -> list[dict[str, Any]]:
    """The parameters of the runs that a deployment has been given."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                deployment_id=FlowRunFilterDeploymentId(any_=[UUID(deployment)])
            )
        )
    assert all(run.state is not None and run.state.is_scheduled() for run in runs)
    return [run.parameters for run in runs]


def _num_green(picture: bytes) -> int:
    red, green, blue = np.moveaxis(
        np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), np.int16), -1, 0
    )
    return int(((green > red + 60) & (green > blue + 40)).sum())
