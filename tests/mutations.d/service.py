"""Breaks of what the HTTP service promises."""

from tests.mutation import Mutation

SERVICE = "portrait_dist/inference/service.py"
TESTS = "tests/unit/test_serve.py::test_"

MUTATIONS = [
    Mutation(
        SERVICE,
        "if self.working >= self.limits.max_requests:",
        "if self.working > self.limits.max_requests:",
        TESTS + "beyond_the_limit_the_answer_is_503_at_once_and_what_was_taken_is_done",
        "requests beyond the limit are refused at once",
    ),
    Mutation(
        SERVICE,
        "if taken > self.max_bytes:",
        "if taken > 2 * self.max_bytes:",
        TESTS + "what_is_too_large_or_no_photo_is_refused_by_name",
        "a body is read up to its limit",
    ),
    Mutation(
        SERVICE,
        "async with asyncio.timeout(limits.timeout_seconds):",
        "async with asyncio.timeout(None):",
        TESTS + "a_request_ends_at_its_time_limit_and_the_next_ones_are_answered",
        "a request ends at its time limit",
    ),
    Mutation(
        SERVICE,
        "if not needs_no_file(background):",
        "if False:",
        TESTS + "a_wrong_option_is_refused_and_none_names_a_file_of_the_machine",
        "a client names no files of the machine",
    ),
    Mutation(
        SERVICE,
        "for (_, future), alpha in zip(batch, alphas, strict=True):",
        "for (_, future), alpha in zip(batch, alphas[::-1], strict=True):",
        TESTS + "each_of_many_requests_at_once_gets_its_own_mask_and_they_share_batches",
        "each request gets its own mask",
    ),
]
