"""Breaks of configuration, plan, resume, start and command line."""

from tests.mutation import Mutation

MUTATIONS = [
    Mutation(
        file="portrait_dist/recipes/reading.py",
        old="        if depth > MOST_DEPTH:",
        new="        if depth > 10**9:",
        test="tests/unit/test_config.py::test_a_recipe_of_any_bytes_is_refused_in_one_line_with_file_and_line",
        why="a hostile recipe is one line",
    ),
    Mutation(
        file="portrait_dist/recipes/reading.py",
        old="        if key in lines:",
        new="        if False:",
        test="tests/unit/test_config.py::test_a_recipe_of_any_bytes_is_refused_in_one_line_with_file_and_line",
        why="a key given twice is refused",
    ),
    Mutation(
        file="portrait_dist/config.py",
        old='if path.is_absolute() or ".." in path.parts:',
        new="if path.is_absolute():",
        test="tests/unit/test_config.py::test_a_value_out_of_bounds_is_one_short_line_with_exit_code_2",
        why="run.name cannot leave run.root",
    ),
    Mutation(
        file="portrait_dist/config.py",
        old="return redact(value) if isinstance(value, str) else value",
        new="return value",
        test="tests/unit/test_config.py::test_secrets_of_an_address_are_used_but_not_kept_or_shown",
        why="secrets of addresses are not kept",
    ),
    Mutation(
        file="portrait_dist/training/resume.py",
        old="    _refuse_other_data(config, info, data)\n",
        new="",
        test="tests/unit/test_resume.py::test_other_shards_are_refused_and_the_run_is_as_before",
        why="other data never joins a run",
    ),
    Mutation(
        file="portrait_dist/training/main.py",
        old="        if start.finished:\n",
        new="        _begin(config, report)\n        if start.finished:\n",
        test="tests/unit/test_resume.py::test_numbers_are_the_same_in_result_events_and_submit",
        why="a finished run is left as it is",
    ),
    Mutation(
        file="portrait_dist/training/main.py",
        old="        start = _decide(config, plan, loaders)\n",
        new="        _begin(config, report)\n        start = _decide(config, plan, loaders)\n",
        test="tests/unit/test_resume.py::test_a_refused_command_changes_nothing_in_the_run_folder",
        why="a refused start changes nothing in the run folder",
    ),
    Mutation(
        file="portrait_dist/training/plan.py",
        old='"train.batch_size" not in config.given',
        new="False",
        test="tests/unit/test_plan.py::test_a_small_split_is_trained_with_a_smaller_batch_and_a_line_says_so",
        why="a small folder trains",
    ),
    Mutation(
        file="portrait_dist/training/plan.py",
        old="if per_rank % count == 0 and per_rank // count <= train.batch_size",
        new="if per_rank // count <= train.batch_size",
        test="tests/unit/test_plan.py::test_a_fixed_global_batch_is_the_same_on_any_number_of_ranks_that_divides_it",
        why="the global batch survives other ranks",
    ),
    Mutation(
        file="portrait_dist/distributed.py",
        old='store.add(f"{token}/confirmed", 0) == world_size() - 1',
        new="True",
        test="tests/unit/test_distributed.py::test_a_name_that_a_killed_rank_left_is_never_part_of_a_start",
        why="a killed rank's name joins no start",
    ),
    Mutation(
        file="portrait_dist/distributed.py",
        old="    if not odd:\n",
        new="    if True:\n",
        test="tests/unit/test_distributed.py::test_a_rank_with_another_kind_of_device_is_refused_by_number_and_host",
        why="ranks run on one kind of device",
    ),
    Mutation(
        file="portrait_dist/cli.py",
        old="cut_short = isinstance(error, click.Abort) and isinstance(error.__cause__, EOFError)",
        new="cut_short = False",
        test="tests/unit/test_cli.py::test_a_failed_disk_is_one_line_and_a_bug_keeps_its_traceback",
        why="a file cut short is no interruption",
    ),
]
