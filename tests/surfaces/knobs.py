"""For every option of the config a test in which it is not its default and the outcome shows it.

`FILE::TEST` below `tests`. What decides nothing but where or how fast a run goes is here too.
"""

LOOP = "student_trainer/training/test_plain_loop.py::test_steps_are_those_of_a_plain_loop"
MATRIX = "student_trainer/training/test_matrix.py::test_a_cell_trains_and_resumes_bit_for_bit"
POLICY = "cluster/control/test_policies.py::test_a_policy_follows_its_equations"
LIMITS = "cluster/control/test_policies.py::test_floors_and_caps_hold_after_every_decision"
PHASES = "student_trainer/test_phases.py::test_a_run_goes_through_its_phases_and_says_so"
DIVERGENCE = (
    "student_trainer/losses/terms/test_divergences_in_training.py"
    "::test_values_and_gradients_equal_the_textbook_in_float64"
)
LEAVES = "cluster/launch/test_driver.py::test_a_run_leaves_everything_behind"
HIDDEN = "cluster/launch/test_asked.py::test_hidden_states_are_projected_by_the_teacher"
PROMPTS = (
    "cluster/commands/test_prompts.py"
    "::test_the_command_writes_what_training_reads_and_the_second_time_asks_for_no_score"
)
HUB = "laws/test_models_of_the_hub.py"
DATASETS = "shared/text/test_datasets.py"
ENGINES = "engines/test_vllm.py::test_a_teacher_in_vllm_is_asked_through_its_own_python"
ROWS = "shared/data/test_accounts.py"
LAUNCH = "cluster/launch/test_settings.py"
PLACEMENT = "cluster/session/test_placement.py"
QUESTION = "cluster/planning/test_question.py"
DECISIONS = "shared/mixture/test_decisions.py"
DIAGNOSTICS = "student_trainer/metrics/test_diagnostics.py"
SCALING = "teacher_service/service/scaling/test_policy.py"
ROLLOUTS = "student_trainer/sources/generated/test_rollouts.py"
WEIGHER = "student_trainer/weighing/test_weigher.py"
TEMPERATURES = "test_token_temperatures_are_those_of_the_whole_step_however_it_is_cut"
EQUATIONS = (
    "student_trainer/weighing/test_llkd.py"
    "::test_what_is_learnt_and_what_it_counts_follow_the_equations"
)
INSTANCES = "student_trainer/weighing/test_instance_weights.py"
LINE = "test_the_steepness_falls_on_a_line_to_the_last_step"
REINFORCED = "student_trainer/weighing/test_reinforced.py"
FILLED = "shared/data/augmented/test_fills.py"
FILLING = "cluster/launch/teachers/test_filling.py"
CHANGING = "shared/data/augmented/test_augmenting.py"
REWARDED = "test_a_look_moves_the_policy_by_what_the_reward_is_over_its_running_mean"
CENTRE = "test_the_centre_is_a_number_or_the_running_mean_of_the_steps_before"
ADAPTIVE = "student_trainer/sources/generated/test_adaptive.py"
PARTNERS = "student_trainer/sources/generated/test_partners.py"
TEXTS = "student_trainer/sources/generated/test_teacher_texts.py"
COPIES = "cluster/launch/test_copies.py"
ONLINE = "student_trainer/sources/test_online_teacher.py"
MOVES = "test_what_modules_learn_changes_what_the_student_learns"
FOLLOWED = "student_trainer/sources/test_followed_student.py"
DIFFERS = "test_a_student_differs_from_what_it_was_and_not_from_what_it_is"
LEARNING = "teacher_service/engine/test_learning.py::test_every_option_changes_what_is_learnt"
IN_VLLM = "cluster/rollouts/test_in_vllm.py::test_its_own_python_is_looked_for_on_its_node"
SERVED = "shared/config/models/test_rollouts.py"
ADVANTAGES = "student_trainer/weighing/test_advantages.py"
CONVENTIONS = "test_the_three_conventions_and_others_have_their_golden_vectors"
WRITTEN = "test_every_option_that_is_accepted_changes_what_is_written"

BALANCE = "student_trainer/test_balance.py"
BOUNDS = "test_a_frozen_side_is_told_and_the_other_one_slowed_to_the_bound"
STEPS = "test_steps_are_those_of_a_plain_loop"
CLASSES = "cluster/planning/tasks/test_classes.py"
CONTRAST = "student_trainer/losses/auxiliary/test_contrast.py"
MARKING = "student_trainer/tasks/test_marking.py"
LIKELIEST = "test_steps_are_those_of_a_plain_loop_and_entities_those_of_its_likeliest_copies"
WORDS = "cluster/planning/tasks/test_words.py"
TYPES = "test_types_are_in_the_order_that_is_asked_for_and_are_all_of_training_rows"
EPISODE = "test_shots_and_episode_decide_the_training_rows_and_no_validation_row"
READS = "test_the_teacher_reads_the_template_and_writes_the_words_of_the_classes"
UPCYCLED = (
    "student_trainer/models/test_upcycling.py::test_a_mixture_computes_what_the_dense_model_does"
)
ACTIVE_LIVE = "cluster/commands/test_active.py"
EXPLAINED = "cluster/active/test_elad.py"
DRAWS = "test_a_real_student_is_as_sure_of_its_explanations_as_its_draws_are_alike"
ACTIVE_LOOP = "cluster/active/test_loop.py"
ACTIVE_PROMPT = "cluster/active/test_pgkd.py"
SHOWN = f"{ACTIVE_PROMPT}::test_a_prompt_has_its_parts_in_order_and_the_rows_each_is_about"
COUNTED = f"{ACTIVE_PROMPT}::test_as_many_rows_are_shown_as_are_asked_for"

ALIKE = "cluster/launch/teachers/test_similarity.py::test_every_option_changes_them"

WORKERS = "shared/config/test_run.py::test_workers_are_numbers_within_bounds_that_divide_a_step"

KNOBS = {
    "name": LEAVES,
    "seed": LOOP,
    "steps": LOOP,
    "log_every": LOOP,
    "paths.root": LEAVES,
    "paths.runs": LEAVES,
    "paths.cache": LEAVES,
    "teachers.NAME.model": LEAVES,
    "teachers.NAME.revision": f"{HUB}::test_a_teacher_is_the_one_of_its_revision",
    "teachers.NAME.adapter": f"{HUB}::test_an_adapter_is_the_one_of_its_revision",
    "teachers.NAME.adapter_revision": f"{HUB}::test_an_adapter_is_the_one_of_its_revision",
    "teachers.NAME.dtype": (
        "teacher_service/engine/test_audit.py::test_a_quantised_teacher_scores_and_says_what_it_costs"
    ),
    "teachers.NAME.attention": (
        "teacher_service/engine/test_attention.py"
        "::test_the_attention_asked_for_answers_and_is_part_of_the_fingerprint"
    ),
    "teachers.NAME.quantisation": (
        "teacher_service/engine/test_audit.py::test_a_quantised_teacher_scores_and_says_what_it_costs"
    ),
    "teachers.NAME.trust_remote_code": (
        f"{HUB}::test_a_models_own_code_runs_where_the_config_trusts_it"
    ),
    "teachers.NAME.engine": ENGINES,
    "teachers.NAME.python": ENGINES,
    "teachers.NAME.replicas": (
        "teacher_service/engine/generation/test_generating.py"
        "::test_two_replicas_answer_in_order_with_the_bits_of_one"
    ),
    "teachers.NAME.replicas.min": f"{SCALING}::test_a_service_that_nobody_asks_has_its_fewest",
    "teachers.NAME.replicas.max": f"{SCALING}::test_a_service_that_nobody_asks_has_its_fewest",
    "teachers.NAME.replicas.wait": f"{SCALING}::test_a_load_that_stays_makes_a_number_that_stays",
    "teachers.NAME.gpus": f"{PLACEMENT}::test_a_replica_asks_for_what_its_config_says",
    "teachers.NAME.cpus": f"{PLACEMENT}::test_a_replica_asks_for_what_its_config_says",
    "teachers.NAME.tensor_parallel": (
        "teacher_service/service/replicas/test_ranks.py"
        "::test_more_ranks_than_there_is_room_for_are_refused"
    ),
    "teachers.NAME.online_modules.r": LEARNING,
    "teachers.NAME.online_modules.alpha": LEARNING,
    "teachers.NAME.online_modules.target_modules": LEARNING,
    "teachers.NAME.online_modules.lr": LEARNING,
    "teachers.NAME.online_modules.eta": LEARNING,
    "teachers.NAME.online_modules.divergence": LEARNING,
    "teachers.NAME.online_modules.top_k": f"{ONLINE}::{MOVES}",
    "teachers.NAME.online_modules.lag": f"{ONLINE}::{MOVES}",
    "teachers.NAME.online_modules": f"{ONLINE}::{MOVES}",
    "teachers.NAME.follow_student.lag": f"{FOLLOWED}::{DIFFERS}",
    "teachers.NAME.follow_student.every": f"{FOLLOWED}::{DIFFERS}",
    "teachers.NAME.follow_student": f"{FOLLOWED}::{DIFFERS}",
    "teachers.NAME.similarity.samples": ALIKE,
    "teachers.NAME.similarity.diagonal": ALIKE,
    "teachers.NAME.similarity.passes": ALIKE,
    "student.model": LEAVES,
    "student.revision": f"{HUB}::test_a_student_is_the_one_of_its_revision",
    "student.trust_remote_code": f"{HUB}::test_a_models_own_code_runs_where_the_config_trusts_it",
    "student.train.kind": LOOP,
    "student.train.r": LOOP,
    "student.train.alpha": LOOP,
    "student.train.dropout": (
        "student_trainer/training/test_training_laws.py"
        "::test_dropout_is_on_while_training_and_repeats_with_its_seed"
    ),
    "student.train.target_modules": (
        "student_trainer/models/test_student.py::test_target_modules_name_what_is_adapted"
    ),
    "student.upcycle.every": UPCYCLED,
    "student.upcycle.experts": UPCYCLED,
    "student.upcycle.top_k": UPCYCLED,
    "student.upcycle.train": (
        "student_trainer/models/test_upcycling.py::test_the_expert_for_all_tokens_stays_out"
    ),
    "student.upcycle": UPCYCLED,
    "student.dtype": MATRIX,
    "student.attention": (
        "student_trainer/models/test_student.py::test_a_student_attends_as_the_config_says"
    ),
    "student.zero": LOOP,
    "student.activation_checkpointing": (
        "student_trainer/models/test_student.py::test_activations_are_made_anew_where_asked"
    ),
    "student.workers": LOOP,
    "student.workers.min": WORKERS,
    "student.workers.max": WORKERS,
    "student.gpus": f"{PLACEMENT}::test_a_worker_asks_for_what_its_config_says",
    "student.cpus": f"{PLACEMENT}::test_a_worker_asks_for_what_its_config_says",
    "student.max_restarts": f"{LAUNCH}::test_workers_are_restarted_as_often_as_the_config_says",
    "task.kind": f"student_trainer/tasks/test_classification.py::{STEPS}",
    "task.template": f"{CLASSES}::{READS}",
    "task.verbaliser": f"{CLASSES}::{READS}",
    "task.calibration": f"{CLASSES}::{READS}",
    "task.content_free": f"{CLASSES}::{READS}",
    "task.labels": f"{CLASSES}::test_classes_are_in_the_order_that_is_asked_for",
    "task.types": f"{WORDS}::{TYPES}",
    "task.shots": f"{WORDS}::{EPISODE}",
    "task.episode": f"{WORDS}::{EPISODE}",
    "domains.NAME.train": LEAVES,
    "domains.NAME.train.dataset": f"{DATASETS}::test_a_dataset_is_read_as_the_config_describes_it",
    "domains.NAME.train.config": f"{DATASETS}::test_a_dataset_is_read_as_the_config_describes_it",
    "domains.NAME.train.split": f"{DATASETS}::test_a_dataset_is_read_as_the_config_describes_it",
    "domains.NAME.train.revision": f"{DATASETS}::test_the_revision_goes_to_the_hub",
    "domains.NAME.train.N": f"{DATASETS}::test_sources_of_all_kinds_stand_side_by_side",
    "domains.NAME.train.N.dataset": f"{DATASETS}::test_sources_of_all_kinds_stand_side_by_side",
    "domains.NAME.train.N.config": f"{DATASETS}::test_sources_of_all_kinds_stand_side_by_side",
    "domains.NAME.train.N.split": f"{DATASETS}::test_sources_of_all_kinds_stand_side_by_side",
    "domains.NAME.train.N.revision": f"{DATASETS}::test_the_revision_goes_to_the_hub",
    "domains.NAME.validation": (
        "shared/data/test_tokenise.py::test_validation_rows_are_spread_over_the_text_and_capped"
    ),
    "domains.NAME.validation.dataset": (
        f"{DATASETS}::test_a_dataset_is_read_as_the_config_describes_it"
    ),
    "domains.NAME.validation.config": (
        f"{DATASETS}::test_a_dataset_is_read_as_the_config_describes_it"
    ),
    "domains.NAME.validation.split": (
        f"{DATASETS}::test_a_dataset_is_read_as_the_config_describes_it"
    ),
    "domains.NAME.validation.revision": f"{DATASETS}::test_the_revision_goes_to_the_hub",
    "domains.NAME.validation.N": f"{DATASETS}::test_sources_of_all_kinds_stand_side_by_side",
    "domains.NAME.validation.N.dataset": (
        f"{DATASETS}::test_sources_of_all_kinds_stand_side_by_side"
    ),
    "domains.NAME.validation.N.config": (
        f"{DATASETS}::test_sources_of_all_kinds_stand_side_by_side"
    ),
    "domains.NAME.validation.N.split": f"{DATASETS}::test_sources_of_all_kinds_stand_side_by_side",
    "domains.NAME.validation.N.revision": f"{DATASETS}::test_the_revision_goes_to_the_hub",
    "domains.NAME.columns": f"{DATASETS}::test_a_dataset_is_read_as_the_config_describes_it",
    "domains.NAME.teacher": (
        "student_trainer/test_teachers.py"
        "::test_a_mixed_micro_batch_is_the_sum_of_one_for_each_teacher"
    ),
    "data.context": (
        "shared/data/test_tokenise.py::test_rows_hold_the_context_at_most_and_are_well_filled"
    ),
    "data.loss_on": (
        "shared/text/test_framing.py"
        "::test_with_loss_on_everything_all_but_the_last_position_has_loss"
    ),
    "data.too_long": (
        "shared/data/test_tokenise.py::test_long_text_is_counted_and_treated_as_configured"
    ),
    "data.unfit": (
        "cluster/planning/test_row_prompting.py"
        "::test_a_conversation_with_several_answers_is_dropped_too"
    ),
    "data.special_tokens": f"{ROWS}::test_options_decide_what_special_tokens_and_templates_become",
    "data.chat_template": f"{ROWS}::test_options_decide_what_special_tokens_and_templates_become",
    "data.validation_rows": (
        "shared/data/test_tokenise.py::test_validation_rows_are_spread_over_the_text_and_capped"
    ),
    "prompts": (
        "cluster/planning/test_prompting.py"
        "::test_validation_and_weights_are_of_the_teacher_as_it_was_shown"
    ),
    "batch.rows_per_step": LOOP,
    "batch.micro_batch": LOOP,
    "source.dataset": f"{ROLLOUTS}::test_shares_are_near",
    "source.student": f"{ROLLOUTS}::test_shares_are_near",
    "source.teacher": f"{TEXTS}::test_who_writes_a_row_is_told_apart",
    "source.adaptive.every": f"{ADAPTIVE}::test_every_option_decides",
    "source.adaptive.start": f"{ADAPTIVE}::test_every_option_decides",
    "source.adaptive.growth": f"{ADAPTIVE}::test_every_option_decides",
    "source.adaptive.tolerance": f"{ADAPTIVE}::test_every_option_decides",
    "source.adaptive.replay_rows": (f"{ADAPTIVE}::test_a_full_buffer_is_learnt_from_more_and_more"),
    "source.adaptive": f"{ADAPTIVE}::test_the_share_moves_and_old_text_is_learnt_again",
    "source.prompt_tokens": f"{ROLLOUTS}::{WRITTEN}",
    "source.max_new_tokens": f"{ROLLOUTS}::{WRITTEN}",
    "source.min_new_tokens": f"{ROLLOUTS}::test_lengths_are_as_asked",
    "source.temperature": f"{ROLLOUTS}::{WRITTEN}",
    "source.top_p": f"{ROLLOUTS}::{WRITTEN}",
    "source.teacher_mix": (
        f"{PARTNERS}::test_weights_are_kept_with_the_rollouts_and_bounded_by_the_share"
    ),
    "source.draws": f"{TEXTS}::test_draws_take_turns_from_epoch_to_epoch",
    "source.lag": f"{ROLLOUTS}::test_step_s_learns_what_version_s_minus_lag_wrote",
    "source.updates": f"{ROLLOUTS}::test_a_block_is_written_once_for_several_updates",
    "source.batch_rows": f"{ROLLOUTS}::test_who_holds_which_rows_and_weights_changes_no_text",
    "rollouts.replicas": f"{COPIES}::test_copies_write_are_listed_and_leave_nothing_behind",
    "rollouts.replicas.min": f"{SERVED}::test_copies_are_served_as_asked",
    "rollouts.replicas.max": f"{SERVED}::test_copies_are_served_as_asked",
    "rollouts.replicas.wait": f"{SERVED}::test_copies_are_served_as_asked",
    "rollouts.gpus": f"{SERVED}::test_copies_are_served_as_asked",
    "rollouts.cpus": f"{COPIES}::test_copies_write_are_listed_and_leave_nothing_behind",
    "rollouts.engine": IN_VLLM,
    "rollouts.python": IN_VLLM,
    "targets.selector": "cluster/launch/test_asked.py::test_a_run_on_drawn_ids_fills_a_store",
    "targets.top_k": LOOP,
    "targets.student_ids": (
        "cluster/launch/test_asked.py::test_a_student_that_names_ids_is_answered_about_them"
    ),
    "targets.draws": "student_trainer/sources/test_loader.py"
    "::test_every_epoch_learns_from_another_draw",
    "targets.seed": f"{QUESTION}::test_the_seed_of_draws_is_part_of_the_question",
    "targets.encoding": (f"{QUESTION}::test_what_is_asked_is_what_the_config_says"),
    "targets.ids": f"{QUESTION}::test_what_is_asked_is_what_the_config_says",
    "targets.exact": (
        "cluster/launch/test_asked.py"
        "::test_last_states_teach_the_whole_vocabulary_live_and_from_a_store"
    ),
    "targets.hidden.width": HIDDEN,
    "targets.hidden.projection": (
        "cluster/planning/test_projecting.py"
        "::test_random_directions_read_no_rows_and_ask_no_teacher"
    ),
    "targets.hidden.raw": HIDDEN,
    "targets.hidden.encoding": HIDDEN,
    "targets.hidden.calibration_rows": (
        "cluster/planning/test_projecting.py"
        "::test_a_pca_is_made_anew_for_whatever_decides_it_and_for_nothing_else"
    ),
    "targets.store": (
        "cluster/launch/test_driver.py"
        "::test_a_store_filled_by_one_run_feeds_another_without_a_teacher"
    ),
    "targets.store_ids": ("cluster/launch/test_asked.py::test_a_run_on_drawn_ids_fills_a_store"),
    "targets.teacher_free": (
        "cluster/launch/test_driver.py"
        "::test_a_store_filled_by_one_run_feeds_another_without_a_teacher"
    ),
    "cross_tokenizer": (
        "student_trainer/losses/across/test_across.py"
        "::test_uld_is_the_sum_of_differences_of_sorted_probabilities"
    ),
    "losses.N.weight": LOOP,
    "losses.N.temperature": LOOP,
    "losses.N.times_temperature_squared": LOOP,
    "losses.N.kind": LOOP,
    "losses.N.beta": LOOP,
    "losses.N.continuous": DIVERGENCE,
    "losses.N.alpha": LOOP,
    "losses.N.mu": DIVERGENCE,
    "losses.N.direction": DIVERGENCE,
    "losses.N.t_start": LOOP,
    "losses.N.t_end": LOOP,
    "losses.N.hard_fraction": (
        "student_trainer/weighing/test_weigher.py"
        "::test_atkd_splits_the_whole_step_however_it_is_cut"
    ),
    "losses.N.easy_weight": f"{DIAGNOSTICS}::test_the_loss_is_that_of_the_paper",
    "losses.N.divergence": f"{WEIGHER}::{TEMPERATURES}",
    "losses.N.strength": f"{WEIGHER}::{TEMPERATURES}",
    "losses.N.levels": f"{WEIGHER}::{TEMPERATURES}",
    "losses.N.hardest": f"{WEIGHER}::{TEMPERATURES}",
    "losses.N.credit": f"{ADVANTAGES}::{CONVENTIONS}",
    "losses.N.discount": f"{ADVANTAGES}::{CONVENTIONS}",
    "losses.N.clip": (
        "student_trainer/losses/terms/test_policy_gradient.py"
        "::test_a_clip_bounds_what_a_ratio_counts"
    ),
    "losses.N.whiten": (
        f"{ADVANTAGES}::test_white_advantages_are_those_of_a_micro_batch_over_all_workers"
    ),
    "losses.N.objective": (
        "student_trainer/weighing/test_preferences.py"
        "::test_a_step_is_that_of_the_dense_models_however_it_is_cut"
    ),
    "losses.N.pairs": (
        "cluster/launch/test_pairing.py"
        "::test_the_teachers_likeliest_text_is_chosen_and_the_students_rejected"
    ),
    "losses.N.final_weight": (
        "student_trainer/test_phases.py::test_the_loss_adds_up_with_the_weight_of_its_phase"
    ),
    "losses.N.layers": HIDDEN,
    "losses.N.distance": (
        "student_trainer/losses/auxiliary/test_hidden_states.py"
        "::test_distances_are_means_over_width_and_layers"
    ),
    "losses.N.group": (
        "student_trainer/losses/auxiliary/test_self_features.py"
        "::test_channels_are_averaged_in_groups_and_pairs_of_layers_too"
    ),
    "losses.N.layer": f"{CONTRAST}::test_states_are_those_of_the_labels_own_tokens_in_the_layer",
    "losses.N.tau": f"{CONTRAST}::test_values_are_those_of_each_entity_in_float64_and_0_elsewhere",
    "losses.N.epsilon": f"{MARKING}::{LIKELIEST}",
    "losses.N.experts_per_token": (
        "student_trainer/losses/auxiliary/test_router_balance.py"
        "::test_the_loss_of_a_step_is_that_of_a_plain_step"
    ),
    "augmentation.share": (
        f"{CHANGING}::test_a_share_of_documents_is_changed_and_the_others_are_as_they_were"
    ),
    "augmentation.mask": f"{FILLING}::test_what_is_filled_is_asked_once_and_other_masks_anew",
    "augmentation.candidates": (
        f"{FILLING}::test_fills_are_among_the_teachers_likeliest_ids_after_the_text_to_the_left"
    ),
    "augmentation.copies": (
        f"{FILLED}::test_changed_documents_have_the_fills_of_their_epochs_copy_and_others_none"
    ),
    "augmentation.across": (
        f"{FILLING}::test_fills_are_among_the_teachers_likeliest_ids_after_the_text_to_the_left"
    ),
    "augmentation.replace": f"{CHANGING}::test_tokens_are_replaced_by_those_of_another_domain",
    "augmentation.swap": f"{CHANGING}::test_neighbours_change_places_and_none_is_lost",
    "augmentation.delete": f"{CHANGING}::test_tokens_are_left_out",
    "weighting.policy": (
        "student_trainer/weighing/test_weighting.py"
        "::test_a_weighted_run_resumes_bit_for_bit_with_its_state"
    ),
    "weighting.decay": EQUATIONS,
    "weighting.unit": EQUATIONS,
    "weighting.confidence": EQUATIONS,
    "weighting.uncertainty": EQUATIONS,
    "weighting.by": EQUATIONS,
    "weighting.steepness": f"{INSTANCES}::{LINE}",
    "weighting.final_steepness": f"{INSTANCES}::{LINE}",
    "weighting.centre": f"{INSTANCES}::{CENTRE}",
    "weighting.start": f"{REINFORCED}::test_a_policy_of_probability_1_keeps_all_and_stays",
    "weighting.step_size": f"{REINFORCED}::{REWARDED}",
    "weighting.every": f"{REINFORCED}::test_looks_are_due_every_so_many_steps",
    "weighting.rows": f"{REINFORCED}::test_looks_are_due_every_so_many_steps",
    "optimiser.lr": LOOP,
    "optimiser.betas": LOOP,
    "optimiser.eps": LOOP,
    "optimiser.weight_decay": LOOP,
    "optimiser.warmup_steps": LOOP,
    "optimiser.schedule": LOOP,
    "optimiser.final_lr_fraction": LOOP,
    "optimiser.clip_norm": LOOP,
    "optimiser.balance.every": f"{BALANCE}::test_the_balance_and_what_it_costs_are_in_the_lines",
    "optimiser.balance.decay": f"{BALANCE}::test_measurements_are_at_equal_rates_and_fade",
    "optimiser.balance.least": f"{BALANCE}::{BOUNDS}",
    "optimiser.balance.most": f"{BALANCE}::{BOUNDS}",
    "optimiser.balance.positions": (
        f"{BALANCE}::test_kappa_is_that_of_the_divergences_in_float64_and_its_factors_undo_it"
    ),
    "optimiser.balance": f"{BALANCE}::test_measuring_changes_no_bit_and_factors_do",
    "mixture.policy": LIMITS,
    "mixture.weights": POLICY,
    "mixture.interval": (
        f"{DECISIONS}::test_decisions_settle_exactly_the_blocks_before_the_next_one_takes_effect"
    ),
    "mixture.lag_steps": (
        "shared/mixture/test_decisions.py"
        "::test_an_entry_takes_effect_after_the_lag_and_says_what_was_measured"
    ),
    "mixture.floor": LIMITS,
    "mixture.max_change": LIMITS,
    "mixture.deadline_s": (
        "cluster/control/test_controller.py"
        "::test_an_undecided_entry_is_a_sentence_after_the_deadline"
    ),
    "mixture.alpha": POLICY,
    "mixture.start": POLICY,
    "mixture.stop_ratio": (
        "student_trainer/test_phases.py"
        "::test_a_student_near_its_teacher_ends_training_and_the_run_knows"
    ),
    "mixture.step_size": POLICY,
    "mixture.smoothing": POLICY,
    "progressive.difficulty": (
        "cluster/planning/test_ordering.py"
        "::test_rows_are_ordered_by_the_gap_that_transformers_finds"
    ),
    "progressive.phases": "cluster/planning/test_ordering.py::test_a_run_goes_through_its_phases",
    "progressive.replay": (
        "shared/mixture/test_curriculum.py"
        "::test_shares_go_to_the_new_part_and_replay_to_those_before"
    ),
    "progressive.max_steps": (
        "shared/mixture/test_phases.py::test_a_phase_lasts_max_steps_up_to_the_next_decision"
    ),
    "progressive.plateau": (
        "shared/mixture/test_phases.py"
        "::test_a_phase_ends_once_the_gap_falls_by_less_than_plateau_over_patience"
    ),
    "progressive.patience": (
        "shared/mixture/test_phases.py"
        "::test_a_phase_ends_once_the_gap_falls_by_less_than_plateau_over_patience"
    ),
    "progressive.interval": (
        "shared/mixture/test_decisions.py"
        "::test_fixed_weights_with_phases_are_decided_at_an_interval"
    ),
    "progressive": PHASES,
    "service.in_flight": f"{LAUNCH}::test_a_pool_is_what_the_config_says",
    "service.unit_deadline_s": f"{LAUNCH}::test_a_pool_is_what_the_config_says",
    "service.max_unit_failures": f"{LAUNCH}::test_a_pool_is_what_the_config_says",
    "evaluation.kl": f"{QUESTION}::test_an_evaluation_is_over_what_the_config_says",
    "evaluation.store_gb": (
        "cluster/launch/test_capture.py"
        "::test_validation_answers_beyond_the_budget_are_kept_over_the_likeliest_ids"
    ),
    "evaluation.far_student": (
        "student_trainer/evaluation/test_weak_teachers.py"
        "::test_a_student_that_is_far_away_learns_where_the_config_says_so_but_not_from_no_number"
    ),
    "checkpoints.every": MATRIX,
    "checkpoints.keep": (
        "student_trainer/training/test_training_laws.py"
        "::test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_row"
    ),
    "prompt_search.metric": (
        "cluster/commands/test_prompts.py"
        "::test_too_little_text_and_a_metric_without_right_answers_are_refused"
    ),
    "prompt_search.instructions": PROMPTS,
    "prompt_search.rounds": "cluster/prompt_search/test_search.py::test_rounds_are_bounded",
    "prompt_search.beam": PROMPTS,
    "prompt_search.paraphrases": PROMPTS,
    "prompt_search.keywords": PROMPTS,
    "prompt_search.examples": PROMPTS,
    "prompt_search.dev_documents": (
        "cluster/commands/test_prompts.py"
        "::test_too_little_text_and_a_metric_without_right_answers_are_refused"
    ),
    "prompt_search.confirm_documents": PROMPTS,
    "prompt_search.pool_documents": PROMPTS,
    "prompt_search.max_new_tokens": PROMPTS,
    "prompt_search.to": PROMPTS,
    "active.domain": f"{ACTIVE_LOOP}::test_one_domain_of_several_grows",
    "active.instruction": SHOWN,
    "active.rounds": f"{ACTIVE_LOOP}::test_rounds_stop_exactly_at_patience",
    "active.patience": f"{ACTIVE_LOOP}::test_rounds_stop_exactly_at_patience",
    "active.budget_tokens": f"{ACTIVE_LOOP}::test_the_budget_is_counted_exactly_and_never_exceeded",
    "active.start": f"{ACTIVE_LOOP}::test_every_round_may_start_from_the_student_of_the_config",
    "active.metric": f"{ACTIVE_LOOP}::test_the_best_round_may_be_that_of_the_lowest_loss",
    "active.train_prompts": f"{ACTIVE_LOOP}::test_as_many_prompts_are_answered_as_are_asked_for",
    "active.validation_prompts": (
        f"{ACTIVE_LOOP}::test_as_many_prompts_are_answered_as_are_asked_for"
    ),
    "active.max_new_tokens": (
        f"{ACTIVE_LOOP}::test_the_budget_is_counted_exactly_and_never_exceeded"
    ),
    "active.temperature": (
        f"{ACTIVE_LOOP}"
        "::test_a_round_of_which_nothing_is_kept_says_so_and_goes_on_once_asked_otherwise"
    ),
    "active.method": f"{ACTIVE_LIVE}::test_bad_input_is_a_sentence_before_anything_starts",
    "active.max_classes": (
        f"{ACTIVE_PROMPT}::test_what_a_class_is_and_how_many_there_may_be_is_the_responses"
    ),
    "active.prompts": SHOWN,
    "active.rows": SHOWN,
    "active.shots": COUNTED,
    "active.correct": COUNTED,
    "active.incorrect": COUNTED,
    "active.hard_negatives": COUNTED,
    "active.report_classes": SHOWN,
    "active.questions": (
        f"{EXPLAINED}::test_the_explanations_that_the_student_is_least_sure_of_are_read"
    ),
    "active.samples": f"{ACTIVE_LIVE}::{DRAWS}",
    "active.sample_temperature": f"{ACTIVE_LIVE}::{DRAWS}",
    "active.answer_marker": (
        f"{EXPLAINED}"
        "::test_a_teacher_that_finds_nothing_errs_or_cannot_be_read_leaves_nothing_to_learn"
    ),
    "active": f"{ACTIVE_LOOP}::test_rounds_stop_exactly_at_patience",
    "stages": (
        "cluster/launch/test_staging.py::test_a_stage_begins_with_what_the_one_before_it_ended_with"
    ),
    "trackers": (
        "student_trainer/tracking/test_trackers.py"
        "::test_a_resumed_run_continues_its_curves_and_says_that_its_config_changed"
    ),
    "baseline": "cluster/launch/test_driver.py::test_the_baseline_drew_the_same_rows",
}
