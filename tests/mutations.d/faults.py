"""Breaks of what holds when servers are away, launchers die and processes crash."""

from tests.mutation import Mutation

MUTATIONS = [
    Mutation(
        file="portrait_dist/distributed.py",
        old="    _check_torchrun_is_there()\n    timeout",
        new="    timeout",
        test="tests/unit/test_distributed.py"
        "::test_a_rank_whose_torchrun_is_gone_before_it_could_look_ends_instead_of_knocking",
        why="ranks end when torchrun is killed while they start",
    ),
    Mutation(
        file="portrait_dist/cli.py",
        old="        faulthandler.enable()  # a native crash tells where\n",
        new="        pass\n",
        test="tests/unit/test_cli.py::test_a_native_crash_says_where_also_without_torchrun",
        why="a native crash says where",
    ),
    Mutation(
        file="portrait_dist/slurm/job.py",
        old="    events = Events(tuple(found)[before:], found.skipped)\n",
        new="    events = Events(tuple(one for one in found if one.time >= time.time() - 9), 0)\n",
        test="tests/slurm/test_requeue_decisions.py"
        "::test_an_attempts_lines_are_its_own_whatever_the_clocks_of_the_nodes_say",
        why="why an attempt ended does not depend on the clocks of nodes",
    ),
    Mutation(
        file="portrait_dist/runs/status.py",
        old="max(0.0, round(self.now - moment, 1))",
        new="round(self.now - moment, 1)",
        test="tests/unit/test_status.py"
        "::test_a_clock_behind_the_one_that_wrote_gives_no_negative_ages",
        why="no age is negative",
    ),
    Mutation(
        file="portrait_dist/cli.py",
        old="        if error.errno in NO_PATH:",
        new="        if False:",
        test="tests/unit/test_cli.py"
        "::test_a_path_that_cannot_be_one_is_wrong_input_for_every_command",
        why="a path that cannot be one is wrong input",
    ),
    Mutation(
        file="portrait_dist/files.py",
        old="        errno.EEXIST,  # where a folder should be: a link to nowhere\n",
        new="",
        test="tests/unit/test_cli.py"
        "::test_a_path_that_cannot_be_one_is_wrong_input_for_every_command",
        why="a link to nowhere is no folder to write into",
    ),
    Mutation(
        file="portrait_dist/data/shards/cache.py",
        old="        with _claimed(part, cancelled):\n",
        new='        with _claimed(self.folder / f".lock-{sha256[:2]}", cancelled):\n',
        test="tests/unit/test_cache.py::test_downloads_that_wait_for_their_server_hold_up_no_other",
        why="a download waits for no other file's server",
    ),
    Mutation(
        file="portrait_dist/data/shards/cache.py",
        old="            if _is_at(part, file):",
        new="            if True:",
        test="tests/unit/test_cache.py"
        "::test_who_waited_for_a_part_that_was_renamed_meanwhile_claims_a_new_one",
        why="a lock on a renamed part is not the lock of the next",
    ),
    Mutation(
        file="portrait_dist/training/resume.py",
        old="        checkpoints.check_whole(folder.best)\n",
        new="        pass\n",
        test="tests/unit/test_resume.py"
        "::test_a_damaged_checkpoint_is_refused_before_anything_is_written",
        why="a damaged best checkpoint is refused before anything is written",
    ),
    Mutation(
        file="portrait_dist/checkpoints.py",
        old='self.need(named and _is_plain(found), f"{entry}',
        new='self.need(named, f"{entry}',
        test="tests/unit/test_checkpoints.py::test_settings_in_a_checkpoint_are_plain_values",
        why="settings in a checkpoint are plain values",
    ),
    Mutation(
        file="portrait_dist/data/shards/download.py",
        old="    if size is not None and start > size:  # no beginning of this file\n",
        new="    if False:\n",
        test="tests/unit/test_cache.py"
        "::test_a_partial_download_longer_than_the_file_is_no_beginning_of_it",
        why="a part that is too long is no beginning of a file",
    ),
    Mutation(
        file="portrait_dist/data/shards/writer.py",
        old="        with folder.locked():\n            try:\n",
        new="        with contextlib.ExitStack() as stack:\n"
        "            stack.callback(lambda: os.listdir(out) or out.rmdir())\n"
        "            stack.enter_context(folder.locked())\n            try:\n",
        test="tests/unit/test_pack.py::test_two_packs_do_not_write_into_one_folder",
        why="a refused pack leaves the folder to the one at work",
    ),
    Mutation(
        file="portrait_dist/training/resume.py",
        old='    if state.get("ema_net") and (',
        new="    if False and (",
        test="tests/unit/test_resume.py::"
        "test_a_damaged_checkpoint_is_refused_before_anything_is_written",
        why="a moving average that does not fit is refused before anything is written",
    ),
    Mutation(
        file="portrait_dist/training/resume.py",
        old="    if problem:\n        raise DamagedDataError(",
        new="    if False:\n        raise DamagedDataError(",
        test="tests/unit/test_resume.py::"
        "test_a_damaged_checkpoint_is_refused_before_anything_is_written",
        why="a state of the optimiser that cannot continue is refused before anything is written",
    ),
    Mutation(
        file="portrait_dist/training/main.py",
        old="            folder.events()  # a file that",
        new="            folder  # a file that",
        test="tests/unit/test_resume.py::test_what_cannot_be_written_on_is_"
        "refused_before_anything_is_written",
        why="a file of events that cannot be continued is refused before anything is written",
    ),
    Mutation(
        file="portrait_dist/training/averaging.py",
        old="        if average.is_dir() or (snapshots.exists() and not snapshots.is_dir()):\n",
        new="        if not self.folder.exists():\n",
        test="tests/unit/test_resume.py::test_what_cannot_be_written_on_is_"
        "refused_before_anything_is_written",
        why="a folder in the place of the average is refused before anything is written",
    ),
    Mutation(
        file="portrait_dist/training/averaging.py",
        old="        average.check_files(members or ())\n        average.resume(members)\n",
        new="        with contextlib.suppress(InputError):\n            average.resume(members)\n",
        test="tests/unit/test_checkpoints.py::"
        "test_a_finished_run_that_was_killed_before_its_average_is_completed",
        why="an average that cannot be written loses none of its models",
    ),
    Mutation(
        file="portrait_dist/training/sg_adapter.py",
        old="        with contextlib.suppress(OSError):\n            super().run()",
        new="        super().run()",
        test="tests/unit/test_drop_in.py::"
        "test_a_full_disk_under_tensorboard_is_the_trainings_error_and_shows_no_traceback",
        why="a full disk under TensorBoard shows no traceback of a thread",
    ),
    Mutation(
        file="portrait_dist/inference/export.py",
        old="printable(card))",
        new="card)",
        test="tests/unit/test_export.py::"
        "test_a_model_card_beside_the_file_says_what_the_network_is_and_its_scores",
        why="a model card names a file of any name",
    ),
]
