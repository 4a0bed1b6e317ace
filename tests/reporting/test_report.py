"""The report in a real browser: what a reader sees and reads is what the run's files hold, and rows stay text."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import find_browser
from command_line import fails, run
from made_runs import made_row, write_relevance, write_run
from playwright.sync_api import sync_playwright

from agd_vllm.output.relevance_writer import RelevanceWriter, TokenRelevance
from agd_vllm.output.storage import place_of_file
from agd_vllm.prompts.tokenizer import load_tokenizer
from agd_vllm.reporting.report import ReportSettings, write_report
from agd_vllm.reporting.rows import differences, natural_order

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

HOSTILE_ID = "</script ></script><img src=x onerror=attacked()>"
HOSTILE = (
    "</script><script>attacked()</script><!-- <script> & \u2028 &lt;b&gt; <img src='http://192.0.2.1/x' "
    "onerror='attacked()'> 日本語 🙂 \u202eevil\n\n{{ 7 * 7 }} </textarea><repo_name>"
)
ANSWER = "A lighthouse keeper trims the lamp, winds the clockwork and writes the log before the morning fog."


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return load_tokenizer(str(smollm2))


@pytest.fixture(scope="module")
def run_directory(smollm2, tokenizer, tmp_path_factory):
    """Three rows, one of them hostile; relevance for two steps of the first."""
    prompt = (
        "<|im_start|>system\nAnswer in one sentence.<|im_end|>\n<|im_start|>user\nWhat does a keeper do?<|im_end|>\n"
    )
    rows = [
        made_row(tokenizer, "row-1", prompt, ANSWER, guided=(0, 3, 4, 9), metadata='{"topic": "<b>sea</b>"}'),
        made_row(tokenizer, HOSTILE_ID, HOSTILE, HOSTILE, guided=(1, 2), metadata=json.dumps(HOSTILE)),
        made_row(tokenizer, "row-10", "Say nothing of note.", "Nothing of note."),
    ]
    directory = write_run(tmp_path_factory.mktemp("report") / "<i>night watch", rows, str(smollm2), roi=HOSTILE)
    for step in (3, 4):
        write_relevance(directory, rows[0], step)
    return directory


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    if path is None:
        pytest.fail("no browser: `make browser` brings one", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens reports; at the end none of them may have complained, called a row's script or asked for anything."""
    pages, faults = [], []

    def open_page(path, **options):
        page = browser.new_page(**options)
        pages.append(page)
        page.add_init_script("window.attacked = () => { window.wasAttacked = true; }")
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.on("request", lambda request: request.url.startswith("file:") or faults.append(request.url))
        page.goto("file://" + quote(str(path)))
        return page

    yield open_page
    attacked = [page.evaluate("window.wasAttacked") for page in pages]
    for page in pages:
        page.close()
    assert faults == []
    assert not any(attacked)


@pytest.fixture(scope="module")
def report(run_directory):
    path, shown, left_out = write_report(ReportSettings(str(run_directory)))
    assert (shown, left_out) == (3, 0)
    assert path == f"{run_directory}/report.html"
    return path


def stored(directory, folder, **wanted):
    rows = pq.read_table(directory / folder).to_pylist()
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def number(text):
    return float(text.replace("\u2212", "-").replace("+", "").replace(" %", ""))


def token(page, row, step):
    return page.locator(f"article:has(h3:text-is({json.dumps(row)})) [data-step='{step}']")


def test_the_summary_shows_the_runs_figures(opened, report):
    text = opened(report).locator(".runs").inner_text()
    for words in ("rows decoded\n3", "6 of the tokens", "tokens per second\n12.5", "τ = 1.734", "rule\nattnlrp"):
        assert words in text
    page = opened(report)
    titles = page.locator(".histogram title").all_text_contents()
    counts = [tuple(map(int, re.findall(r"(\d+) guided steps, (\d+) of them", title)[0])) for title in titles]
    assert (sum(guided for guided, _ in counts), sum(changed for _, changed in counts)) == (6, 3)


@pytest.mark.parametrize("step", [3, 4])
def test_a_click_on_a_guided_token_shows_what_the_parquet_files_hold(opened, report, run_directory, tokenizer, step):
    page = opened(report)
    clicked = token(page, "row-1", step)
    (guided,) = stored(run_directory, "steps", id="row-1", step=step)
    (row,) = stored(run_directory, "results", id="row-1")
    changed = guided["chosen_id"] != guided["greedy_id"]
    assert changed == (step == 4)
    assert ("changed" in clicked.get_attribute("class").split()) == changed
    assert page.locator("#inspector").is_hidden()
    clicked.click()
    inspector = page.locator("#inspector")
    assert f"Entropy {guided['entropy']:.3f}" in inspector.inner_text()
    lines = inspector.locator(".candidates tbody tr").all()
    assert len(lines) == len(guided["candidate_ids"])
    for line, id, probability, score in zip(
        lines, guided["candidate_ids"], guided["candidate_probs"], guided["scores"], strict=True
    ):
        name, likely, scored = line.locator("th, td").all()
        assert name.get_attribute("title") == f"token {id}"
        assert name.locator(".chip").text_content() == tokenizer.decode([id])
        assert number(likely.inner_text()) == pytest.approx(100 * probability, abs=0.051)
        assert number(scored.inner_text()) == pytest.approx(score, rel=6e-3)
        tags = name.locator(".tag").all_text_contents()
        wanted = [("chosen", guided["chosen_id"]), ("greedy", guided["greedy_id"])]
        assert tags == [tag for tag, wanted_id in wanted if id == wanted_id]
    maps = inspector.locator(".heat").all()
    assert len(maps) == (2 if changed else 1)
    for shown, id in zip(maps, dict.fromkeys((guided["chosen_id"], guided["greedy_id"])), strict=True):
        (relevance,) = stored(run_directory, "relevance", id="row-1", step=step, token_id=id)
        values = [
            float(value)
            for value in shown.locator("[data-relevance]").evaluate_all(
                "spans => spans.map(span => span.dataset.relevance)"
            )
        ]
        scale = max(map(abs, relevance["relevance"]))
        assert values == pytest.approx(relevance["relevance"], abs=2e-5 * scale)
        assert shown.locator("figcaption .chip").text_content() == tokenizer.decode([id])
        spans = row["roi_spans"]
        region = sum(span["weight"] * sum(relevance["relevance"][span["start"] : span["end"]]) for span in spans)
        told = re.search(r"region (\S+)", shown.locator(".facts").inner_text())[1]
        assert number(told) == pytest.approx(region, rel=6e-3, abs=1e-3)
        text = "".join(shown.locator("[data-relevance]").all_text_contents())
        assert text == tokenizer.decode(row["prompt_token_ids"] + row["token_ids"][:step])


def test_answers_are_shown_token_by_token(opened, report, run_directory):
    page = opened(report)
    (row,) = stored(run_directory, "results", id="row-1")
    shown = page.locator("article:has(h3:text-is('row-1')) .answer .token").all_text_contents()
    assert len(shown) == len(row["token_ids"])
    assert "".join(shown) == ANSWER
    entropies = {step["step"]: step["entropy"] for step in stored(run_directory, "steps", id="row-1")}
    shades = {
        step: float(token(page, "row-1", step).evaluate("e => e.style.getPropertyValue('--shade')"))
        for step in entropies
    }
    assert sorted(shades, key=shades.get) == sorted(entropies, key=entropies.get)
    assert len(set(shades.values())) == len(shades)


def test_rows_are_text_whatever_they_hold(opened, report):
    page = opened(report)
    row = page.locator(f"article:has(h3:text-is({json.dumps(HOSTILE_ID)}))")
    assert row.locator(".answer").text_content().replace("↵", "").replace("·", "") == HOSTILE
    assert json.loads(row.locator(".metadata").text_content()) == HOSTILE
    row.locator("summary").click()
    row.locator(".prompt .text").wait_for()
    assert row.locator(".prompt .text").text_content() == HOSTILE
    assert "<i>night watch" in page.locator("h1").text_content()
    assert HOSTILE in page.locator(".parameters").text_content()
    token(page, HOSTILE_ID, 1).click()
    assert HOSTILE_ID in page.locator("#inspector .facts").first.text_content()
    assert page.locator("img").count() == 0


def test_no_script_but_the_pages_own_runs(browser, report):
    """A second line of defence: even a row that broke out of its data would be met by the page's policy."""
    page = browser.new_page()
    page.goto("file://" + quote(report))
    said = []
    page.on("console", lambda message: said.append(message.text))
    inject = "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = true'}))"
    page.evaluate(inject)
    assert page.evaluate("window.ran") is None
    assert "Content Security Policy" in said[0]
    page.close()


def test_without_relevance_the_page_says_which_command_makes_it(opened, report, run_directory):
    page = opened(report)
    token(page, "row-1", 9).click()
    assert "No heat map" in page.locator("#inspector .missing").inner_text()
    command = page.locator("#inspector .missing code").inner_text()
    assert command == f"agd-vllm attribute --run '{run_directory}' --max-steps 16"


@pytest.mark.parametrize(
    "ran", [{"strategy": name} for name in ("steer", "dola", "cad")] + [{"engine_args": {"quantization": "fp8"}}]
)
def test_a_run_that_attribute_refuses_has_no_command_for_it(opened, capsys, smollm2, tokenizer, tmp_path, ran):
    row = made_row(tokenizer, "row-1", "A prompt.", "An answer.", guided=(1,))
    directory = write_run(tmp_path / "run", [row], str(smollm2), **ran)
    fails(capsys, 2, "attribute", "--run", str(directory))
    page = opened(write_report(ReportSettings(str(directory)))[0])
    token(page, "row-1", 1).click()
    said = page.locator("#inspector .missing").inner_text()
    assert said.startswith("No heat map: attribution explains the logits of the model itself")
    assert "agd-vllm attribute" not in page.content()


def test_the_keyboard_reaches_everything(opened, report):
    page = opened(report)
    focused = lambda: page.evaluate("document.activeElement.dataset.step ?? document.activeElement.id")  # noqa: E731
    page.locator("#search").focus()
    for _ in range(8):
        page.keyboard.press("Tab")
        if focused().isdigit():
            break
    # Rows are in the order of their ids, so the hostile one comes first.
    assert focused() == "1"
    page.keyboard.press("Tab")
    while not focused().isdigit():
        page.keyboard.press("Tab")
    assert focused() == "0"
    page.keyboard.press("ArrowRight")
    assert focused() == "3"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    assert page.locator("#inspector").is_hidden()
    page.keyboard.press("Enter")
    assert "step 3" in page.locator("#inspector").inner_text()
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.keyboard.press("ArrowRight")
    assert "step 4" in page.locator("#inspector").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#inspector").is_hidden()
    assert focused() == "4"
    page.keyboard.press("Enter")
    page.locator("#inspector .close").focus()
    page.keyboard.press("Enter")
    assert page.locator("#inspector").is_hidden()
    assert focused() == "4"
    assert re.search(r"step 4, guided, entropy \d\.\d\d, changed", token(page, "row-1", 4).get_attribute("aria-label"))


CONTRASTS = """() => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const over = (colors) => {
    context.clearRect(0, 0, 1, 1);
    for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const lowest = {};
  for (const element of document.querySelectorAll("body *:not(script, noscript, svg *)")) {
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    if (!element.checkVisibility() || element.disabled) continue;
    const grounds = [];
    for (let at = element; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
    const ground = luminance(over(grounds));
    const text = luminance(over([...grounds, getComputedStyle(element).color]));
    const ratio = (Math.max(ground, text) + 0.05) / (Math.min(ground, text) + 0.05);
    const name = `${element.tagName} ${element.className}`;
    lowest[name] = Math.min(lowest[name] ?? 99, ratio);
  }
  return lowest;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast_in_light_and_dark(opened, report, scheme):
    page = opened(report, color_scheme=scheme)
    token(page, "row-1", 4).click()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ("20, 22, 26" in ground) == (scheme == "dark")
    lowest = page.evaluate(CONTRASTS)
    assert len(lowest) > 15
    assert {name: ratio for name, ratio in lowest.items() if ratio < 4.5} == {}


def test_two_runs_side_by_side(opened, run_directory, smollm2, tokenizer, tmp_path):
    changed = ANSWER.replace("winds", "quietly winds")
    rows = [
        made_row(tokenizer, "row-1", "Other prompt.", changed),
        made_row(tokenizer, "row-10", "Say", "Nothing of note."),
    ]
    other = write_run(tmp_path / "greedy", rows, str(smollm2), strategy="greedy")
    output = tmp_path / "deeper" / "both.html"
    write_report(ReportSettings(str(run_directory), compare=str(other), output=str(output)))
    page = opened(output)
    article = page.locator("article:has(h3:text-is('row-1'))")
    ids, other_ids = tokenizer(ANSWER)["input_ids"], tokenizer(changed)["input_ids"]
    first = next(at for at, pair in enumerate(zip(ids, other_ids, strict=False)) if pair[0] != pair[1])
    assert article.locator(".verdict").inner_text() == f"first difference at token {first}"
    mine, its = article.locator(".side").all()
    assert mine.locator(".differs").all_text_contents() == []
    assert "".join(its.locator(".differs").all_text_contents()).strip() == "quietly"
    assert "same tokens" in page.locator("article:has(h3:text-is('row-10'))").inner_text()
    assert "This run has no such row." in page.locator("#rows article").first.inner_text()
    page.locator("#filter").select_option("differs")
    assert page.locator("#rows h3").all_text_contents() == [HOSTILE_ID, "row-1"]


def test_a_steered_run_names_its_file_layers_and_strength(smollm2, tokenizer, tmp_path):
    ran = {"strategy": "steer", "steering": "a, b.safetensors, 99 bytes, starting 0f", "steering_strength": -2.0}
    directory = write_run(tmp_path / "run", [made_row(tokenizer, "r", "Say", ANSWER)], str(smollm2), **ran)
    summary = json.loads((directory / "summary.json").read_text())
    for layers, words in (([3, 15], "layers 3, 15 · "), ([3], "layer 3 · "), (None, "")):  # none while the run goes on
        (directory / "summary.json").write_text(json.dumps(summary | {"steering_layers": layers}))
        path, _, _ = write_report(ReportSettings(str(directory)))
        assert f" · steer · a, b.safetensors · {words}strength -2<" in Path(path).read_text()


def test_the_page_is_written_where_it_was_asked(capsys, monkeypatch, run_directory, tmp_path):
    for asked, place in (
        ("/x.html", "/x.html"),
        ("file:///x.html", "/x.html"),
        ("/a/b/x.html", "/a/b/x.html"),
        ("x.html", f"{tmp_path}/x.html"),
        ("./a/x.html", f"{tmp_path}/a/x.html"),
    ):
        monkeypatch.chdir(tmp_path)
        folder, name = place_of_file(asked)
        assert folder.path(name) == place
    for asked, name in (("x.html", "x.html"), (f"{tmp_path}/new/y.html", "new/y.html"), (f"file://{tmp_path}/z", "z")):
        assert run(capsys, "report", str(run_directory), "--output", asked)[:2] == (0, f"3 rows\nreport: {asked}\n")
        assert (tmp_path / name).read_text().startswith("<!doctype html>")
    for asked in (str(tmp_path), f"{tmp_path}/", "."):
        assert "that is a folder; name a file" in fails(capsys, 2, "report", str(run_directory), "--output", asked)


def test_differences_are_aligned():
    assert differences([1, 2, 3, 4], [1, 2, 9, 3, 4]) == {"first": 2, "ranges": [[], [[2, 3]]]}
    assert differences([1, 2, 3], [1, 5, 3, 4]) == {"first": 1, "ranges": [[[1, 2]], [[1, 2], [3, 4]]]}
    assert differences([1, 2], [1, 2])["first"] is None


def test_ids_are_in_natural_order():
    assert sorted(["r10", "r2", "r02x", "a", "", "7"], key=natural_order) == ["", "7", "a", "r2", "r02x", "r10"]


@pytest.fixture(scope="module")
def large(smollm2, tokenizer, tmp_path_factory):
    """520 rows of some 270 tokens, with 60 guided steps and 16 heat maps each: as large as reports grow."""
    words = (ANSWER + " ") * 13
    rows = []
    for index in range(520):
        text = f"Number {index}. {words}" if index != 430 else f"Number {index}, the needle. {words}"
        rows.append(made_row(tokenizer, f"row-{index}", f"Context. {words}", text, guided=range(0, 240, 4)))
    directory = write_run(tmp_path_factory.mktemp("large") / "run", rows, str(smollm2))
    values = np.random.default_rng(0).normal(size=600).astype(np.float32)
    with RelevanceWriter(str(directory)) as writer:
        for row in rows:
            length = len(row.prompt_token_ids)
            writer.add(
                row.id, [TokenRelevance(s.step, s.chosen_id, 1.0, values[: length + s.step]) for s in row.steps[:16]]
            )
    path, shown, left_out = write_report(ReportSettings(str(directory)))
    assert (shown, left_out) == (500, 20)
    return path


def test_500_rows_open_within_two_seconds_and_are_paged_and_searched(opened, large):
    page = opened(large)
    seconds = page.evaluate("performance.getEntriesByName('shown')[0].startTime") / 1000
    print(f"{Path(large).stat().st_size / 1e6:.1f} MB, shown after {seconds:.2f} s")
    assert seconds < 2
    assert page.locator("#rows article").count() == 20
    assert "500 of 520 rows" in page.locator("#left-out").inner_text()
    assert page.locator("#count").inner_text() == "1\u201320 of 500 rows"
    page.locator("#next").click()
    assert page.locator("#rows h3").first.inner_text() == "row-20"
    assert page.locator("#place").inner_text() == "2 / 25"
    page.locator("#search").fill("The NEEDLE")
    page.locator("#count:text-is('1\u20131 of 1 row')").wait_for()
    assert page.locator("#rows h3").all_text_contents() == ["row-430"]
    page.locator("#search").fill("no row says this")
    page.locator("#rows .empty").wait_for()
    assert page.locator("#count").inner_text() == "0 rows"


def test_a_run_without_summary_or_guided_steps_has_a_report(opened, smollm2, tokenizer, tmp_path):
    rows = [made_row(tokenizer, "row-1", "Say", ANSWER)]
    directory = write_run(tmp_path / "run", rows, str(smollm2), strategy="greedy", tau=None)
    (directory / "summary.json").unlink()
    path, _, _ = write_report(ReportSettings(str(directory)))
    text = opened(path).locator("body").inner_text()
    assert "No step of this run was guided." in text
    assert "guided steps\n0.0%" in text


def test_unusable_runs_are_one_line(capsys, run_directory, smollm2, tokenizer, tmp_path):
    assert "no run is there" in fails(capsys, 2, "report", str(tmp_path / "nowhere"))
    assert "no run is there" in fails(capsys, 2, "report", str(run_directory), "--compare", str(tmp_path))
    empty = write_run(tmp_path / "empty", [], str(smollm2))
    assert "no row is decoded there" in fails(capsys, 2, "report", str(empty))
    row = made_row(tokenizer, "row-1", "Say", "Nothing.")
    moved = write_run(tmp_path / "moved", [row], str(tmp_path / "gone"))
    assert "--model" in fails(capsys, 2, "report", str(moved))
    assert "max-rows" in fails(capsys, 2, "report", str(run_directory), "--max-rows", "0")
    status, out, _ = run(capsys, "report", str(moved), "--model", str(smollm2))
    assert (status, out.splitlines()) == (0, ["1 row", f"report: {moved}/report.html"])
    torn = shutil.copytree(run_directory, tmp_path / "torn")
    (torn / "results/part-00000.parquet").write_bytes(b"PAR1")
    assert "part-00000.parquet" in fails(capsys, 1, "report", str(torn))
