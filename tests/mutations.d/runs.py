"""Breaks of guarantees of runs, reports and SLURM jobs."""

from tests.mutation import Mutation

FOLDER = "portrait_dist/runs/folder.py"
JOB = "portrait_dist/slurm/job.py"
TIMEOUTS = (
    "tests/unit/test_distributed.py::"
    "test_gloo_has_the_timeout_of_the_settings_and_nccl_a_minute_more"
)

MUTATIONS = [
    Mutation(
        file="portrait_dist/training/main.py",
        old="    if distributed.rank() != 0:\n        return None\n    return open_tracker(",
        new="    return open_tracker(",
        test="tests/ranks/test_training_ranks.py::"
        "test_of_two_ranks_rank_0_alone_sends_a_run_to_the_tracker_and_each_value_once",
        why="a tracker gets one run from all ranks",
    ),
    Mutation(
        file="portrait_dist/runs/report/collect.py",
        old="number = self._sets.number_of(sample.position)",
        new="number = 0",
        test="tests/unit/test_mixing.py::"
        "test_a_run_of_several_sets_trains_and_refuses_other_weights_by_name",
        why="the report gives each shard set its own scores",
    ),
    Mutation(
        file="portrait_dist/runs/scores.py",
        old="if not all(map(math.isfinite, numbers.values())):",
        new="if False:",
        test="tests/unit/test_status.py::test_a_file_of_scores_that_is_none_is_passed_by",
        why="status reads past a file of scores that is none",
    ),
    Mutation(
        file=FOLDER,
        old='if size and os.pread(descriptor, 1, size - 1) != b"\\n":',
        new="if False:",
        test="tests/unit/test_run_folder.py::"
        "test_a_line_that_a_crash_cut_short_does_not_swallow_the_next_one",
        why="a line that a crash cut short does not swallow the next one",
    ),
    Mutation(
        file=FOLDER,
        old="if isinstance(value, float) and not math.isfinite(value):",
        new="if False:",
        test="tests/unit/test_status.py::test_the_json_of_a_diverged_run_is_valid_json",
        why="status --json is valid JSON",
    ),
    Mutation(
        file=FOLDER,
        old="    if not all(_checks()[name](value) for name, value in known.items()):\n"
        "        return None\n",
        new="",
        test="tests/unit/test_status.py::"
        "test_a_line_that_is_not_what_it_should_be_is_skipped_and_counted",
        why="lines of wrong types are skipped and counted",
    ),
    Mutation(
        file="portrait_dist/files.py",
        old="if error.errno in HELD:\n                return False",
        new="if True:\n                return False",
        test="tests/unit/test_run_folder.py::"
        "test_a_file_system_without_locks_is_warned_of_and_the_run_continues",
        why="a file system without locks is no lock that another process holds",
    ),
    Mutation(
        file=FOLDER,
        old="return SECONDS_FOR_A_DEAD_NODE if restarted and not of_another_job else 0.0",
        new="return 0.0",
        test="tests/unit/test_run_folder.py::"
        "test_a_requeued_job_waits_for_the_lock_of_its_own_dead_attempt",
        why="a requeued job waits for the lock of its own dead attempt",
    ),
    Mutation(
        file=JOB,
        old="    if error.exit_code is not None:\n        return error.exit_code\n",
        new="",
        test="tests/slurm/test_requeue_decisions.py::"
        "test_the_exit_code_comes_from_the_number_and_not_from_the_message",
        why="the exit code is a number and not read out of a sentence",
    ),
    Mutation(
        file=JOB,
        old="        self._child = child\n        self._pass_on()\n",
        new="        self._child = child\n",
        test="tests/slurm/test_requeue_decisions.py::"
        "test_only_the_first_usr2_reaches_srun_also_when_it_comes_before_srun",
        why="a signal that comes before srun is passed on",
    ),
    Mutation(
        file="portrait_dist/slurm/launch_checks.py",
        old='if asked := number("NPROC_PER_NODE"):',
        new="if asked := 0:",
        test="tests/slurm/test_slurm_misuse.py::test_launches_that_fit_are_let_through",
        why="NPROC_PER_NODE may be lower than the node's GPUs",
    ),
    Mutation(
        file="portrait_dist/runs/report/page.py",
        old="autoescape=True",
        new="autoescape=False",
        test="tests/unit/test_report.py::test_what_a_run_wrote_cannot_become_markup",
        why="nothing that a run wrote becomes markup",
    ),
    Mutation(
        file="portrait_dist/runs/report/settings.py",
        old="config.load(self.recipe or None)",
        new="config.load(None)",
        test="tests/unit/test_report.py::test_what_differs_is_decided_by_the_recipe_of_the_run",
        why="the report compares the settings with the run's own recipe",
    ),
    Mutation(
        file="portrait_dist/runs/health.py",
        old="beats[rank].collectives < front",
        new="beats[rank].collectives < 0",
        test="tests/unit/test_health.py::"
        "test_a_rank_that_began_fewer_collectives_is_the_one_that_the_others_wait_for",
        why="status names the rank that the others wait for",
    ),
    Mutation(
        file="portrait_dist/runs/health.py",
        old="raise pickle.UnpicklingError(",
        new="return super().find_class(module, name) or (",
        test="tests/unit/test_health.py::"
        "test_damaged_files_are_ignored_and_no_pickle_executes_code",
        why="a record of collectives executes no code",
    ),
    Mutation(
        file="portrait_dist/training/health.py",
        old="STEPS_OF_A_TIMEOUT * self.slowest",
        new="self.slowest",
        test="tests/unit/test_health.py::"
        "test_the_timeout_of_a_step_is_ten_of_the_slowest_and_at_least_a_minute",
        why="a step may take ten times the slowest one",
    ),
    Mutation(
        file="portrait_dist/training/health.py",
        old="own = [t.data + t.other + factor * t.compute for t in times]",
        new="own = [t.step for t in times]",
        test="tests/unit/test_health.py::"
        "test_a_rank_that_waits_for_data_differs_from_one_that_computes_slowly_or_is_held_up",
        why="a slow rank differs from those that wait for it",
    ),
    Mutation(
        file=JOB,
        old="not one.progressed and not one.sick_nodes",
        new="not one.progressed",
        test="tests/slurm/test_requeue_decisions.py::"
        "test_a_node_is_excluded_when_it_is_sick_or_when_two_attempts_failed_there",
        why="a job that leaves a sick node does not give up",
    ),
    Mutation(
        file="portrait_dist/slurm/node_check.py",
        old="if len(rows) < gpus:",
        new="if False:",
        test="tests/slurm/test_sick_node.py::"
        "test_what_is_wrong_with_a_gpu_is_found_unless_the_job_trains_on_cpus",
        why="a node that lost a GPU is found before it trains",
    ),
    Mutation(
        file="launch/slurm.sbatch",
        old="#SBATCH --nodes=1\n",
        new="#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=1\n",
        test="tests/slurm/test_slurm_elastic.py::"
        "test_a_job_that_lost_a_node_goes_on_with_one_and_the_same_global_batches",
        why="--nodes=MIN-MAX gives as many nodes as there are",
    ),
    Mutation(
        file="portrait_dist/distributed.py",
        old="timeout=timeout + timedelta(seconds=SECONDS_FOR_PYTHON) if gpu else timeout,",
        new="timeout=timeout,",
        test=TIMEOUTS + "[cuda-150]",
        why="NCCL waits longer than gloo",
    ),
    Mutation(
        file="portrait_dist/training/preemption.py",
        old='dist.new_group(backend="gloo", timeout=timeout)',
        new='dist.new_group(backend="gloo")',
        test=TIMEOUTS + "[cpu-90]",
        why="the agreement has the timeout of the settings",
    ),
    Mutation(
        file="portrait_dist/training/health.py",
        old='        "TORCH_FR_BUFFER_SIZE": RECORDED,\n',
        new="",
        test="tests/unit/test_health.py::"
        "test_the_record_of_collectives_is_on_by_default_and_lies_in_the_run",
        why="collectives are recorded by default",
    ),
    Mutation(
        file="portrait_dist/slurm/node_check.py",
        old="    if free < LEAST_SCRATCH:\n",
        new="    if free < 0:\n",
        test="tests/slurm/test_sick_node.py::"
        "test_a_driver_that_hangs_and_a_full_scratch_disk_are_found",
        why="a node without scratch space is sick",
    ),
    Mutation(
        file="portrait_dist/data/shards/format.py",
        old="return _in_use.setdefault(content, _manifest(found))",
        new="return _manifest(found)",
        test="tests/unit/test_manifest.py::"
        "test_splits_that_are_open_at_the_same_time_share_one_manifest",
        why="the splits of a run share one manifest",
    ),
]
