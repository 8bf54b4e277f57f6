"""Breaks of what data work on many machines guarantees."""

from tests.mutation import Mutation

STEPS = "tests/slurm/test_steps.py"
LOST = "tests/slurm/test_lost_steps.py"
PARTS = "tests/unit/test_pack_parts.py"
LABELS = "tests/unit/test_labels.py"
APPEND = "tests/unit/test_append.py"

MUTATIONS = [
    Mutation(
        file="portrait_dist/data/shards/pack_folder.py",
        old='({"fit": "squash", **found} for found in',
        new="({**found} for found in",
        test="tests/unit/test_fit.py::test_a_folder_packed_with_another_fit_is_refused",
        why="squashed and other samples never share a folder",
    ),
    Mutation(
        file="portrait_dist/inference/segmenter.py",
        old='options["fit"] = "letterbox" if one_size else trained.fit',
        new='options["fit"] = "letterbox"',
        test="tests/unit/test_fit.py::"
        "test_predict_takes_the_fit_of_training_unless_it_is_told_another",
        why="photos reach the network as in training",
    ),
    Mutation(
        file="portrait_dist/evaluation.py",
        old="if packed is not None and opened.fit != trained.fit:",
        new="if False:",
        test="tests/unit/test_fit.py::"
        "test_a_run_remembers_its_fit_and_evaluate_and_predict_follow_it",
        why="a checkpoint is scored on images as it was trained on",
    ),
    Mutation(
        file="portrait_dist/slurm/steps.py",
        old='ALWAYS, SUCCESS = "afterany", "afterok"',
        new='ALWAYS, SUCCESS = "afterok", "afterok"',
        test=f"{STEPS}::test_the_finishing_job_refuses_while_a_part_is_missing_and_names_it",
        why="the finishing job names what is missing",
    ),
    Mutation(
        file="portrait_dist/slurm/step_job.py",
        old='ON_RANKS = ("evaluate",)',
        new='ON_RANKS = ("eval",)',
        test=f"{STEPS}::test_one_command_goes_from_a_folder_to_a_report_and_the_masks_of_an_array_"
        "are_one_processs",
        why="a pipeline evaluates on every rank",
    ),
    Mutation(
        file="portrait_dist/slurm/step_job.py",
        old="    if ended.exit_code in (InputError.exit_code, DamagedDataError.exit_code):\n",
        new="    if ended.exit_code in (InputError.exit_code,):\n",
        test=f"{STEPS}::test_a_task_comes_back_after_a_signal_and_not_after_wrong_input",
        why="damaged data does not bring a task back",
    ),
    Mutation(
        file="portrait_dist/slurm/step_job.py",
        old="    events = read_events(logs) if allocation.restarts else []\n",
        new="    events: list[TaskEvent] = []\n",
        test=f"{LOST}::test_masks_scores_and_report_come_back_after_a_lost_node_and_nothing_is_"
        "done_twice",
        why="a step that finished before its node was lost does nothing when it comes back",
    ),
    Mutation(
        file="portrait_dist/slurm/steps.py",
        old="    tasks = max(1, min(parts, units))\n",
        new="    tasks = parts\n",
        test=f"{STEPS}::test_what_would_fail_later_is_refused_before_anything_is_queued",
        why="no task is queued without work",
    ),
    Mutation(
        file="portrait_dist/data/shards/append.py",
        old="[key for key in split.keys(name) if key not in there]",
        new="[key for key in split.keys(name) if key not in old.get(name, [])]",
        test=f"{APPEND}::test_new_pairs_become_new_shards_and_old_samples_stay_in_their_splits",
        why="a sample that is packed never changes its split",
    ),
    Mutation(
        file="portrait_dist/training/resume.py",
        old="    if info.batches is not None:\n        raise InputError(\n"
        '            f"{what}, and it stopped',
        new="    if info.batches is None:\n        raise InputError(\n"
        '            f"{what}, and it stopped',
        test=f"{APPEND}::test_a_run_says_which_version_it_saw_and_takes_another_only_on_purpose_"
        "between_epochs",
        why="another version never joins in the middle of an epoch",
    ),
    Mutation(
        file="portrait_dist/data/shards/append.py",
        old="_number(plan.name) + next_number.get(plan.split, 0)",
        new="_number(plan.name)",
        test=f"{APPEND}::test_new_pairs_become_new_shards_and_old_samples_stay_in_their_splits",
        why="new shards stand behind the old ones",
    ),
    Mutation(
        file="portrait_dist/inference/labels.py",
        old="if value >= least]",
        new="if value > -least]",
        test=f"{LABELS}::test_only_confident_masks_are_packed_and_parts_pack_what_one_process_does",
        why="only confident masks become labels",
    ),
    Mutation(
        file="portrait_dist/data/shards/encode.py",
        old="    if pair.masks == LEVELS:\n",
        new="    if pair.masks == ALPHA:\n",
        test=f"{LABELS}::test_a_mask_is_packed_as_it_was_predicted_whatever_its_levels",
        why="a predicted mask is packed as it is, also where it is dark",
    ),
    Mutation(
        file="portrait_dist/inference/labels.py",
        old="        if name != labels.split:\n",
        new="        if False:\n",
        test=f"{LABELS}::test_masks_of_a_packed_set_are_its_new_alphas_and_its_images_and_other_"
        "splits_stay",
        why="the splits that are not predicted keep their own alphas",
    ),
    Mutation(
        file="portrait_dist/data/shards/pack_folder.py",
        old="                if last:\n",
        new="                if True:\n",
        test=f"{PARTS}::test_a_requeued_part_waits_for_the_lock_of_a_node_that_died",
        why="a part that comes back waits for the lock of its dead node",
    ),
    Mutation(
        file="portrait_dist/data/shards/pack_folder.py",
        old="            if manifest.version > 1:",
        new="            if manifest.version > 9:",
        test=f"{APPEND}::test_packing_without_append_never_replaces_the_versions_of_a_folder",
        why="what has grown is never packed anew in place",
    ),
    Mutation(
        file="portrait_dist/commands/predict.py",
        old="keep_journal=part is not None",
        new="keep_journal=False",
        test="tests/unit/test_predict.py::test_a_single_part_leaves_what_finish_reads",
        why="an array job of one task is found finished",
    ),
    Mutation(
        file="portrait_dist/data/shards/cache.py",
        old="            if abandoned := _is_at(part, file):\n",
        new="            if abandoned := True:\n",
        test="tests/unit/test_cache.py::test_room_is_not_made_with_the_part_of_a_download_that_began_"
        "a_moment_ago",
        why="room in the cache is never made with a part that somebody downloads",
    ),
    Mutation(
        file="portrait_dist/training/trackers.py",
        old='redact(" ".join(str(error).split()))[:300]',
        new='" ".join(str(error).split())[:300]',
        test="tests/unit/test_trackers.py::test_a_tracker_that_fails_is_named_once_and_the_run_"
        "goes_on",
        why="a tracker's address is shown without its password",
    ),
]
