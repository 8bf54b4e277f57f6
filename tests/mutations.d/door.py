"""Breaks of what a newcomer reads and starts: figures, examples, launch files, versions."""

from tests.mutation import Mutation

FIGURES, LAUNCHERS = "tests/unit/test_figures.py", "tests/unit/test_launchers.py"

MUTATIONS = [
    Mutation(
        file="portrait_dist/slurm/container.py",
        old="for one in read_locations(value)]",
        new="for one in read_locations(value)[:1]]",
        test="tests/slurm/test_submit.py"
        "::test_a_container_sees_the_folder_of_each_shard_set_of_a_list",
        why="a job in a container sees all data that it names",
    ),
    Mutation(
        file="README.md",
        old="<!--=loader.times-tutorial-->62<!--/-->",
        new="<!--=loader.times-tutorial-->90<!--/-->",
        test=f"{FIGURES}::test_readme_and_docs_show_the_numbers_of_the_results",
        why="the README shows what was measured",
    ),
    Mutation(
        file="docs/recipes.md",
        old="differences under 0.02 are noise",
        new="differences under 0.002 are noise",
        test=f"{FIGURES}::test_no_measured_number_stands_outside_of_the_results",
        why="no measured number without results",
    ),
    Mutation(
        file="launch/trainjob.yaml",
        old="  runtimePatches:",
        new="  podTemplateOverrides:",
        test=f"{LAUNCHERS}::test_cluster_files_hold_nothing_that_their_program_does_not_know",
        why="the TrainJob fits its schema",
    ),
    Mutation(
        file="launch/trainjob.yaml",
        old="train.global_batch=1024",
        new="train.global_batches=1024",
        test=f"{LAUNCHERS}::test_the_train_job_starts_torchrun_with_settings_that_exist",
        why="the TrainJob's settings exist",
    ),
    Mutation(
        file="launch/skypilot.yaml",
        old="head -n 1",
        new="tail -n 1",
        test=f"{LAUNCHERS}::test_the_sky_task_starts_one_torchrun_per_node_that_all_meet_at_the_first",
        why="cloud nodes meet at the first",
    ),
    Mutation(
        file="launch/Dockerfile",
        old='ENTRYPOINT ["portrait-dist"]',
        new="ENTRYPOINT portrait-dist",
        test=f"{LAUNCHERS}::test_the_image_copies_what_exists_and_gets_signals_itself",
        why="a container's TERM reaches the ranks",
    ),
    Mutation(
        file="requirements.lock",
        old="click==8.5.1",
        new="click==8.1.7",
        test="tests/unit/test_packaging.py::"
        "test_the_lock_fulfils_what_the_package_asks_for_and_names_no_index",
        why="the lock fulfils the package's bounds",
    ),
    Mutation(
        file="examples/own_data.py",
        old="matte.putalpha(alpha)",
        new="matte.putalpha(ImageOps.invert(alpha))",
        test="tests/unit/test_examples.py::"
        "test_own_images_and_grey_masks_become_shards_with_their_masks",
        why="own masks keep their meaning",
    ),
    Mutation(
        file="examples/onnx_in_python.py",
        old="np.float32) / 255",
        new="np.float32)",
        test="tests/unit/test_examples.py::"
        "test_an_exported_network_masks_a_photo_without_this_package",
        why="the ONNX example feeds the network what it expects",
    ),
    Mutation(
        file=".ci/matrix",
        old="if done.returncode == 0 and found == version:",
        new="if done.returncode == 0:",
        test="tests/unit/test_packaging.py::"
        "test_the_matrix_takes_only_a_python_that_runs_and_is_of_that_version",
        why="the matrix runs the Python that it names",
    ),
    Mutation(
        file="portrait_dist/slurm/step_job.py",
        old="    return [*one, *container.python(allocation.gpus), *line]",
        new="    return [*one, sys.executable, *line]",
        test="tests/slurm/test_container.py"
        "::test_a_step_in_a_container_writes_what_it_writes_without_one",
        why="a job with an image runs in it",
    ),
    Mutation(
        file="portrait_dist/slurm/container.py",
        old="        folders |= {os.path.abspath(path), os.path.realpath(path)}",
        new="        folders |= {os.path.abspath(path)}",
        test="tests/slurm/test_submit.py"
        "::test_a_container_sees_the_folders_that_the_job_names_at_their_own_paths",
        why="what a link leads to is seen in the container too",
    ),
    Mutation(
        file="portrait_dist/training/sg_adapter.py",
        old='scalars[f"seconds/{part}"] = inference_time / 1000',
        new='scalars[f"seconds/{part}"] = inference_time',
        test="tests/unit/test_drop_in.py"
        "::test_tensorboard_has_the_fields_names_and_no_system_cards",
        why="curves have the unit of their name",
    ),
]
