"""The pages in a real browser: no complaint, no request, no sideways scrolling, not blank."""

import io
import os
import shutil

import pytest
from browser_page import Chromium
from PIL import Image
from report_sample import EVIL, comparison_rows, make_run

from gracile.report.comparison import write_comparison
from gracile.report.html import write

WIDTHS = (1280, 375)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next((found for n in names if (found := shutil.which(n))), None)
    if binary is None:
        hint = "no Chromium on the PATH; on Debian: apt install chromium"
        if os.environ.get("GRACILE_REQUIRE_BROWSER") == "1":
            pytest.fail(hint)
        pytest.skip(hint)
    with Chromium(binary, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    bare = tmp_path_factory.mktemp("bare")
    (bare / "result.json").write_text("{}")
    return {
        "report": write(make_run(folder, method=EVIL)),
        "compare": write_comparison(folder, comparison_rows()),
        "bare": write(bare),
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", ["report", "compare", "bare"])
def test_a_page_fits_and_nothing_complains(browser, pages, page, width, tmp_path):
    visit = browser.visit(pages[page].as_uri(), width=width)
    assert visit.complaints == []
    assert visit.requests == [pages[page].as_uri()]
    assert visit.inner_width == width
    assert visit.scroll_width <= width
    (tmp_path / "page.png").write_bytes(visit.screenshot)
    assert len(colours(visit)) > 3, f"{tmp_path / 'page.png'} is blank"


def test_a_script_in_a_name_does_not_run(browser, pages):
    assert (
        browser.visit(pages["report"].as_uri(), width=1280).title == "sample_resnet20: Goal missed"
    )


@pytest.mark.parametrize(("dark", "expected"), [(False, (255, 255, 255)), (True, (21, 24, 28))])
def test_the_page_follows_the_colour_scheme(browser, pages, dark, expected):
    assert background(browser.visit(pages["report"].as_uri(), width=375, dark=dark)) == expected


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<script>console.error('sample complaint')</script>", "console.error: sample complaint"),
        ("<script>console.warn('careful')</script>", "console.warning: careful"),
        ("<script>throw new Error('sample failure')</script>", "sample failure"),
        ("<img src='not-there.png'>", "ERR_FILE_NOT_FOUND"),
    ],
)
def test_the_browser_would_notice_a_bad_page(browser, tmp_path, body, complaint):
    page = tmp_path / "bad.html"
    page.write_text(f"<!doctype html><title>bad</title>{body}")
    visit = browser.visit(page.as_uri(), width=375)
    assert any(complaint in said for said in visit.complaints), visit.complaints


def test_the_browser_would_notice_a_page_that_is_too_wide(browser, tmp_path):
    page = tmp_path / "wide.html"
    page.write_text("<!doctype html><title>wide</title><div style='width: 900px'>x</div>")
    assert browser.visit(page.as_uri(), width=375).scroll_width > 375


def test_a_blank_page_has_one_colour(browser, tmp_path):
    page = tmp_path / "blank.html"
    page.write_text("<!doctype html><title>blank</title>")
    assert len(colours(browser.visit(page.as_uri(), width=375))) == 1


def picture(visit):
    return Image.open(io.BytesIO(visit.screenshot)).convert("RGB")


def colours(visit):
    return picture(visit).getcolors(maxcolors=1 << 24)


def background(visit):
    return picture(visit).getpixel((1, 1))
