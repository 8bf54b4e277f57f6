"""The list of breaks: each still fits the code, so that the long run has no surprises."""

from __future__ import annotations

import re

from tests import mutation
from tests.campaign import broken as campaign


def test_every_break_fits_the_code_once_and_names_a_test_that_exists() -> None:
    for name, broken in mutation.load():
        text = (mutation.REPOSITORY / broken.file).read_text()
        assert text.count(broken.old) == 1, (name, broken.file, broken.old)
        assert broken.new != broken.old
        file, _, test = broken.test.partition("::")
        source = (mutation.REPOSITORY / file).read_text()
        function = re.escape(test.partition("[")[0].rpartition("::")[2])
        assert re.search(rf"def {function}\(" if test else "def test_", source), broken.test


def test_every_break_that_the_campaign_must_find_fits_the_code_once_and_names_an_area() -> None:
    areas = (mutation.REPOSITORY / "tests" / "campaign" / "areas.py").read_text()
    for broken in campaign.BREAKS:
        text = (mutation.REPOSITORY / broken.file).read_text()
        assert text.count(broken.old) == 1, (broken.why, broken.file, broken.old)
        assert broken.new != broken.old
        assert f'area("{broken.area}", ' in areas, broken.area
