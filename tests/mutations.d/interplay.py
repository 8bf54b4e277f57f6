"""Breaks of guarantees where features meet: stops and schedules, caches and splits, and so on."""

from tests.mutation import Mutation

DOWNLOAD = "portrait_dist/data/shards/download.py"
READER = "portrait_dist/data/shards/reader.py"
PIPELINE = "portrait_dist/data/stream/pipeline.py"
LISTS = "portrait_dist/data/source/lists.py"
CONTAINER = "portrait_dist/slurm/container.py"
SUBMIT = "portrait_dist/slurm/submit.py"
TRAINER = "portrait_dist/training/trainer.py"
RESUME = "portrait_dist/training/resume.py"
COMPONENTS = "portrait_dist/training/components.py"
JOURNAL = "portrait_dist/inference/journal.py"
PICTURES = "portrait_dist/data/source/pictures.py"
SERVICE = "portrait_dist/inference/service.py"
VIDEO = "portrait_dist/inference/video.py"

REMOTE = "tests/unit/test_remote.py::test_"
HOSTILE = "tests/unit/test_hostile_servers.py::test_"
SOURCES = "tests/unit/test_sources.py::test_"
SWEEPS = "tests/slurm/test_submit.py::test_"
NAMED = "tests/unit/test_named_parts_resume.py::test_"
INFERENCE = "tests/unit/test_inference.py::test_"
PREDICT = "tests/unit/test_predict.py::test_"
SERVE = "tests/unit/test_serve.py::test_"

MUTATIONS = [
    Mutation(
        file="portrait_dist/slurm/job.py",
        old='asked = scontrol("requeue", allocation.label)',
        new='asked = scontrol("requeue", str(allocation.job))',
        test="tests/slurm/test_requeue_decisions.py::"
        "test_the_task_that_has_the_arrays_own_number_requeues_itself_alone",
        why="a task of an array is requeued alone",
    ),
    Mutation(
        file=CONTAINER,
        old="if not os.path.isabs(value) and os.path.realpath(path).startswith(here):",
        new="if not os.path.isabs(value) and not os.path.exists(path):",
        test=f"{SWEEPS}a_container_sees_the_folders_that_the_job_names_at_their_own_paths",
        why="a container sees the folder of what a job will make beside its own",
    ),
    Mutation(
        file=SUBMIT,
        old="        config.load(recipe, task_overrides(overrides, settings, task))\n",
        new="        config.load(recipe, [*overrides, *task])\n",
        test=f"{SWEEPS}a_sweep_is_checked_with_the_runs_that_its_tasks_have",
        why="a sweep is checked with the runs of its tasks",
    ),
    Mutation(
        file=SUBMIT,
        old="shape_of_batches((one.size, one.fit), data.asked_shape, one.shown)",
        new="pass",
        test=f"{SWEEPS}shards_of_another_size_or_fit_are_said_before_queueing",
        why="another size is said before a job waits in the queue",
    ),
    Mutation(
        file=LISTS,
        old="read_rows(path, as_written=True)",
        new="read_rows(path)",
        test=f"{SOURCES}spaces_and_line_ends_in_names_are_part_of_them",
        why="a prepared folder is read as it was written",
    ),
    Mutation(
        file=LISTS,
        old="    if not found:  # not the same as no file: then the pairs are split by chance\n",
        new="    if False:\n",
        test=f"{SOURCES}a_split_file_that_names_no_pair_is_refused",
        why="an empty split file is no chance split",
    ),
    Mutation(
        file="portrait_dist/data/source/split.py",
        old="find_pairs(_written_down(raw, mode), names, str(raw))",
        new="find_pairs(_written_down(raw, mode), names)",
        test=f"{SOURCES}a_list_may_name_files_as_find_prints_them",
        why="a list of files is understood in every mode",
    ),
    Mutation(
        file=DOWNLOAD,
        old="            if late or self._cancelled.is_set():\n",
        new="            if late:\n",
        test=f"{HOSTILE}a_loader_that_is_closed_while_it_waits_for_a_server_ends_at_once",
        why="a silent server keeps nobody from stopping",
    ),
    Mutation(
        file=READER,
        old="return sum(sharing.values()) <= self.cache.limit",
        new="return self.bytes <= self.cache.limit",
        test=f"{REMOTE}splits_that_are_open_together_keep_to_the_size_of_the_cache",
        why="splits share the cache's limit",
    ),
    Mutation(
        file="portrait_dist/data/shards/verify.py",
        old="if not shards.remote or attempt == ATTEMPTS_AGAINST_EVICTION:",
        new="if True:",
        test=f"{REMOTE}shards_that_the_cache_evicts_while_they_are_verified_are_fetched_again",
        why="verify fetches again what the cache evicted",
    ),
    Mutation(
        file=PIPELINE,
        old="except BaseException as error:  # of any kind",
        new="except Exception as error:  # of any kind",
        test="tests/unit/test_transforms.py::"
        "test_an_error_of_any_kind_in_a_decoding_thread_reaches_the_consumer",
        why="no error in a decoding thread hangs the consumer",
    ),
    Mutation(
        file="portrait_dist/data/stream/dataset.py",
        old="if self._identity and self.shards.identity != self._identity:",
        new="if False:",
        test="tests/unit/test_append.py::"
        "test_a_worker_process_that_opens_grown_shards_gives_no_other_samples",
        why="a worker process gives the samples of its dataset",
    ),
    Mutation(
        file="portrait_dist/data/shards/sets.py",
        old="if shards.samples and (other := seen.get(shards.identity)):",
        new="if shards.samples and (other := seen.get(shards.shown)):",
        test="tests/unit/test_foreign.py::test_a_tar_is_no_second_set_under_another_name",
        why="no content is taken as two sets",
    ),
    Mutation(
        file=TRAINER,
        old="        if context.epoch < self.max_epochs:\n            self._save_within_epoch(",
        new="        if True:\n            self._save_within_epoch(",
        test=f"{NAMED}a_stop_while_the_averaged_model_is_validated_keeps_the_last_weights",
        why="the average's weights never take the place of the run's",
    ),
    Mutation(
        file=TRAINER,
        old="            if validating and self._schedule_of_training:\n",
        new="            if False:\n",
        test=f"{NAMED}a_stop_in_validation_lets_a_schedule_advance_once",
        why="a schedule advances once an epoch, stopped or not",
    ),
    Mutation(
        file="portrait_dist/training/state.py",
        old="for name, one in value.items() if _is_plain(one)}",
        new="for name, one in value.items()}",
        test=f"{NAMED}a_stop_in_validation_lets_a_schedule_advance_once",
        why="a schedule with functions among its attributes resumes",
    ),
    Mutation(
        file="portrait_dist/training/main.py",
        old="trainer.on_restore = lambda found: resume.apply_changes(",
        new="trainer.unused = lambda found: resume.apply_changes(",
        test=f"{NAMED}settings_that_a_run_changes_on_purpose_are_taken",
        why="what is accepted as changed is changed",
    ),
    Mutation(
        file=RESUME,
        old='if name in ("params", "lr", "name") or _same(value, before):',
        new='if name in ("params", "lr", "name"):',
        test=f"{NAMED}schedules_of_every_form_take_what_changes_and_keep_how_far_they_are",
        why="a schedule keeps how far it is when its arguments change",
    ),
    Mutation(
        file="portrait_dist/training/sg_adapter.py",
        old="    return apart\n",
        new="    return metrics\n",
        test=f"{NAMED}metrics_that_are_equal_after_the_first_batch_stay_two",
        why="two metrics are two, whatever their first batch",
    ),
    Mutation(
        file="portrait_dist/models/registry.py",
        old="    own_memory_for_buffers(found)\n",
        new="",
        test=f"{NAMED}a_network_with_buffers_that_share_memory_trains_and_is_loaded_again",
        why="buffers of meshgrid can be loaded",
    ),
    Mutation(
        file=COMPONENTS,
        old="            args.setdefault(name, default)\n",
        new="            pass\n",
        test=f"{NAMED}an_optimiser_that_torch_takes_trains_and_resumes",
        why="a named optimiser has torch's defaults",
    ),
    Mutation(
        file="portrait_dist/inference/segmenter.py",
        old="small[inside] = keep_largest(whole[inside])",
        new="small = keep_largest(whole)",
        test=f"{INFERENCE}the_largest_person_is_that_of_the_photo_not_of_what_continues_its_edges",
        why="the largest person is measured in the photo",
    ),
    Mutation(
        file=JOURNAL,
        old='path = "-" if photo.path == STDIN else os.path.abspath(photo.path)',
        new='path = ""',
        test=f"{PREDICT}photos_of_another_folder_never_take_the_place_of_outputs",
        why="outputs of another photo are never overwritten",
    ),
    Mutation(
        file="portrait_dist/inference/batch.py",
        old="self.journal.end(photo, self._identities.pop(photo.name))",
        new="self.journal.end(photo, photo.identity())",
        test=f"{PREDICT}a_photo_that_is_replaced_after_it_was_read_is_done_again",
        why="a photo that was replaced meanwhile is done again",
    ),
    Mutation(
        file=PICTURES,
        old="        grey = ((levels + 128) // 257).astype(np.uint8)",
        new="        grey = np.minimum(levels, 255).astype(np.uint8)",
        test=f"{INFERENCE}grey_levels_of_16_bits_keep_their_brightness",
        why="photos of 16 bits keep their brightness",
    ),
    Mutation(
        file=PICTURES,
        old='if picture.format == "TIFF" and orientation_of(picture) != 1:',
        new="if False:",
        test=f"{INFERENCE}every_type_of_photo_is_read_and_packed_upright",
        why="a TIFF is turned once",
    ),
    Mutation(
        file=VIDEO,
        old="if last < self.seconds - max(1.0, 0.02 * self.seconds):",
        new="if False:",
        test="tests/unit/test_video.py::"
        "test_a_video_that_ends_before_its_time_is_named_and_pixels_keep_their_shape",
        why="half a video is named",
    ),
    Mutation(
        file=SERVICE,
        old="        except ClientDisconnect:  # nobody reads the answer; 499",
        new="        except ZeroDivisionError:  # nobody reads the answer; 499",
        test=f"{SERVE}a_client_that_leaves_is_no_error_of_the_service",
        why="a client that leaves is no error",
    ),
    Mutation(
        file=SERVICE,
        old="exception_handlers={HTTPException: _refuse_as_json},",
        new="",
        test=f"{SERVE}what_is_no_form_no_path_or_no_colour_is_refused_as_json_and_counted",
        why="every refusal of the service is JSON",
    ),
]
