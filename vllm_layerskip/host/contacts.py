# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM's internals that this plugin touches, as data.

``CONTACTS`` names what we call, override or wrap, with the parameters that we rely on;
``model_contacts`` does the same for the classes of one model. ``check.py`` compares both with the
vLLM that is installed, and ``tests/unit/host/test_contacts.py`` walks ``all_contacts()``.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_layerskip.architectures import SUPPORTED_ARCHITECTURES, VllmModel

MODEL_RUNNER_MODULE = "vllm.v1.worker.gpu.model_runner"


@dataclass(frozen=True)
class HostContact:
    """One name of vLLM that we depend on.

    ``path`` is ``module:attribute.attribute``; ``parameters`` are those that we pass by
    name or position or that our override must accept, in vLLM's order; ``why`` says how.
    """

    path: str
    parameters: tuple[str, ...] = ()
    why: str = ""


_GPU = "vllm.v1.worker.gpu"
_REJECTION = f"{_GPU}.spec_decode.rejection_sampler_utils"
_SPECULATOR = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
_MODEL_STATE = "vllm.v1.worker.gpu.model_states.default:DefaultModelState"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_DRAFT_GRAPHS = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils"
_CONFIG = "vllm.config.speculative:SpeculativeConfig"
_LM_HEAD = "vllm.model_executor.layers.vocab_parallel_embedding"
_ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"

CONTACTS: tuple[HostContact, ...] = (
    # Wrapped by plugin.register().
    HostContact(
        f"{_ENGINE_ARGS}.create_speculative_config",
        ("self", "target_model_config", "target_parallel_config"),
        "wrapped: builds LayerSkipConfig when asked to",
    ),
    HostContact(
        f"{_ENGINE_ARGS}.create_model_config",
        ("self",),
        "wrapped: called with hf_overrides of E layers for early exit",
    ),
    HostContact(f"{_ENGINE_ARGS}.add_cli_args", ("parser",), "wrapped: adds our flags"),
    HostContact(f"{_ENGINE_ARGS}.from_cli_args", ("args",), "wrapped: folds our flags in"),
    HostContact(
        "vllm.v1.worker.gpu.spec_decode:init_speculator",
        ("vllm_config", "device", "req_states"),
        "wrapped: returns LayerSkipSpeculator when asked to",
    ),
    HostContact(
        f"{MODEL_RUNNER_MODULE}:init_speculator",
        ("vllm_config", "device", "req_states"),
        "the name under which the runner calls it",
    ),
    HostContact(
        "vllm.model_executor.models.registry:ModelRegistry.register_model",
        ("model_arch", "model_cls"),
        "called: registers our model classes",
    ),
    HostContact(
        "vllm.model_executor.models.registry:_LazyRegisteredModel",
        ("module_name", "class_name"),
        "read: which class stands behind an architecture",
    ),
    HostContact(
        "vllm.model_executor.models.registry:_BaseRegisteredModel.load_model_cls",
        ("self",),
        "called: the same, for a class that was registered as an object",
    ),
    # Config.
    HostContact(f"{_CONFIG}.__post_init__", ("self",), "overridden: carrier is draft_model"),
    HostContact(f"{_CONFIG}.compute_hash", ("self",), "overridden: adds E, K, reuse, version"),
    HostContact(f"{_CONFIG}.max_num_new_slots_for_drafting", (), "overridden: 0 extra slots"),
    HostContact(f"{_CONFIG}.update_arch_", ("self",), "called: re-resolves the model class"),
    HostContact(f"{_CONFIG}._verify_args", ("self",), "runs on our config as well"),
    HostContact("vllm.config:VllmConfig.num_lookahead_tokens", (), "K slots for the drafts"),
    HostContact("vllm.config:VllmConfig.use_v2_model_runner", (), "must be true"),
    # Early exit.
    HostContact(
        "vllm.model_executor.models.registry:ModelRegistry",
        (),
        "models read: the class that an early-exit class derives from",
    ),
    HostContact(
        "vllm.model_executor.models.registry:_LazyRegisteredModel.load_model_cls",
        ("self",),
        "called",
    ),
    HostContact(
        "vllm.config:ModelConfig.get_total_num_hidden_layers", ("self",), "called: L of a model"
    ),
    HostContact("vllm.config:ModelConfig.architecture", (), "read: which model is cut"),
    # Speculator.
    HostContact(f"{_SPECULATOR}.__init__", ("self", "vllm_config", "device"), "called"),
    HostContact(f"{_SPECULATOR}.load_model", ("self", "target_model"), "overridden"),
    HostContact(
        f"{_SPECULATOR}.load_draft_model",
        ("self", "target_model", "target_attn_layer_names"),
        "overridden",
    ),
    HostContact(
        f"{_SPECULATOR}.set_attn",
        (
            "self",
            "model_state",
            "kv_cache_config",
            "block_tables",
            "target_input_buffers",
            "target_attn_groups",
        ),
        "extended: the early layers' names",
    ),
    HostContact(
        f"{_SPECULATOR}.propose",
        (
            "self",
            "input_batch",
            "attn_metadata",
            "slot_mappings",
            "last_hidden_states",
            "aux_hidden_states",
            "num_sampled",
            "num_rejected",
            "last_sampled",
            "next_prefill_tokens",
            "temperature",
            "seeds",
            "dp_sync_state",
            "dummy_run",
            "skip_attn_for_dummy_run",
            "mm_inputs",
            "is_profile",
            "num_speculative_tokens",
        ),
        "overridden",
    ),
    HostContact(f"{_SPECULATOR}.init_cudagraph_manager", ("self", "cudagraph_mode"), "overridden"),
    HostContact(f"{_SPECULATOR}.capture", ("self",), "overridden"),
    HostContact(
        f"{_SPECULATOR}.sample_draft",
        (
            "self",
            "hidden_states",
            "sample_src_positions",
            "idx_mapping",
            "temperature",
            "seeds",
            "draft_step",
            "draft_logits",
        ),
        "called: draws a draft token",
    ),
    HostContact(
        f"{_SPECULATOR}._copy_request_inputs",
        ("self", "num_reqs", "idx_mapping", "temperature", "seeds", "dummy_run"),
        "called",
    ),
    HostContact(
        f"{_SPECULATOR}._build_uniform_attn_metadata",
        (
            "self",
            "batch_desc",
            "num_reqs",
            "num_query_per_req",
            "seq_lens_cpu_upper_bound",
            "step",
        ),
        "called: attention metadata of a draft pass",
    ),
    HostContact(
        f"{_SPECULATOR}._update_draft_decode_metadata",
        ("self", "attn_metadata", "num_reqs"),
        "called: attention metadata of the next pass, inside of the draft graph",
    ),
    HostContact(f"{_SPECULATOR}._validate_local_argmax_reduction", ("self",), "called"),
    HostContact(
        f"{_SPECULATOR}.compute_draft_logits",
        ("self", "hidden_states", "spec_step_idx"),
        "overridden: the draft head's",
    ),
    HostContact(
        f"{_SPECULATOR}.get_draft_top_tokens",
        ("self", "hidden_states", "spec_step_idx"),
        "overridden: the draft head's",
    ),
    # Draft head.
    HostContact(
        f"{_LM_HEAD}:ParallelLMHead.__init__",
        (
            "self",
            "num_embeddings",
            "embedding_dim",
            "bias",
            "params_dtype",
            "padding_size",
            "disable_tp",
        ),
        "called: holds the rows of the draft vocabulary",
    ),
    HostContact(
        f"{_LM_HEAD}:VocabParallelEmbeddingShardIndices.__init__",
        ("self", "org_vocab_start_index", "org_vocab_end_index"),
        "read: which rows a rank holds",
    ),
    HostContact(f"{_LM_HEAD}:DEFAULT_VOCAB_PADDING_SIZE", (), "read"),
    HostContact(
        f"{_LM_HEAD}:UnquantizedEmbeddingMethod.process_weights_after_loading",
        ("self", "layer"),
        "called after the rows are copied",
    ),
    HostContact(
        "vllm.model_executor.layers.linear:UnquantizedLinearMethod",
        (),
        "also keeps a plain LM head",
    ),
    HostContact(
        "vllm.model_executor.layers.logits_processor:LogitsProcessor.get_top_tokens",
        ("self", "lm_head", "hidden_states", "embedding_bias"),
        "called; a copy of the processor gets another vocab_size and org_vocab_size",
    ),
    HostContact("vllm.distributed:tensor_model_parallel_all_reduce", ("input_",), "called"),
    HostContact(
        "vllm.transformers_utils.repo_utils:get_hf_file_bytes",
        ("file_name", "model", "revision"),
        "called: a draft vocabulary in a checkpoint that is no folder",
    ),
    # CUDA graphs.
    HostContact(
        f"{_DRAFT_GRAPHS}:SpeculatorCudaGraphManager.__init__",
        ("self", "vllm_config", "device", "cudagraph_mode", "decode_query_len"),
        "extended: _capture_descs gets the numbers of drafts in use",
    ),
    HostContact(
        f"{_DRAFT_GRAPHS}:SpeculatorCudaGraphManager.capture",
        (
            "self",
            "forward_fn",
            "model_state",
            "input_buffers",
            "block_tables",
            "attn_groups",
            "kv_cache_config",
            "progress_bar_desc",
        ),
        "called: captures the draft passes",
    ),
    HostContact(
        f"{_DRAFT_GRAPHS}:SpeculatorCudaGraphManager.specialize_spec_tokens",
        ("self", "desc", "num_speculative_tokens"),
        "called: the graph for a number of drafts",
    ),
    HostContact(
        f"{_DRAFT_GRAPHS}:SpeculatorBatchDescriptor",
        ("cg_mode", "num_tokens", "num_reqs", "uniform_token_count", "num_speculative_tokens"),
        "built",
    ),
    HostContact(
        f"{_GRAPHS}:CudaGraphManager.dispatch",
        ("self", "num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"),
        "called: the graph for a batch size",
    ),
    HostContact(
        f"{_GRAPHS}:CudaGraphManager._init_candidates",
        ("self",),
        "wrapped: with a schedule _candidates offers the decode graphs of every query length",
    ),
    HostContact(
        "vllm.v1.worker.gpu.warmup:warmup_kernels",
        ("model_runner", "worker_execute_model", "worker_sample_tokens"),
        "runs steps before the first request, named _warmup_...: they are not counted",
    ),
    HostContact(f"{_GRAPHS}:CudaGraphManager.run_fullgraph", ("self", "desc"), "called"),
    HostContact(f"{_GRAPHS}:CudaGraphManager.needs_capture", ("self",), "called"),
    HostContact(
        "vllm.v1.spec_decode.dynamic.utils:build_dynamic_sd_schedule_lookup",
        (
            "num_speculative_tokens_per_batch_size",
            "vllm_max_batch_size",
            "vllm_num_speculative_tokens",
        ),
        "called: numbers of drafts by batch size",
    ),
    HostContact(f"{_CONFIG}.uses_dynamic_speculative_decoding", ("self",), "called"),
    HostContact(
        "vllm.config.compilation:CUDAGraphMode.separate_routine",
        ("self",),
        "called: whether decodes have graphs of their own",
    ),
    HostContact(
        "vllm.v1.worker.utils:AttentionGroup.map_to_kernel_block_table",
        ("self", "block_table"),
        "called before the draft graph replays",
    ),
    # Model state.
    HostContact(
        f"{_MODEL_STATE}.__init__",
        ("self", "vllm_config", "model", "encoder_cache", "device"),
        "extended",
    ),
    HostContact(f"{_MODEL_STATE}.add_request", ("self", "req_index", "new_req_data"), "extended"),
    HostContact(
        f"{_MODEL_STATE}.initialize_kv_cache",
        ("self", "kv_cache_config", "block_tables"),
        "extended: metadata builders of the early stage",
    ),
    HostContact(
        f"{_MODEL_STATE}.prepare_attn",
        (
            "self",
            "input_batch",
            "cudagraph_mode",
            "block_tables",
            "slot_mappings",
            "attn_groups",
            "kv_cache_config",
            "for_capture",
        ),
        "extended: decides whether a verify step reuses, and attaches its plan",
    ),
    HostContact(
        "vllm.v1.worker.gpu.model_states:resolve_model_state_cls",
        ("vllm_config", "model"),
        "asks the model for its state class",
    ),
    # LoRA.
    HostContact(
        "vllm.lora.model_manager:LoRAModelManager.set_adapter_mapping",
        ("self", "mapping"),
        "called: rows of drafts and of verification's logits",
    ),
    HostContact(
        "vllm.lora.layers:LoRAMapping",
        ("index_mapping", "prompt_mapping", "is_prefill"),
        "built as LoRAModelRunnerMixin._set_active_loras builds it",
    ),
    HostContact(f"{_GPU}.lora_utils:NO_LORA_ID", (), "read: a row of the base model"),
    HostContact(
        "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin._set_active_loras",
        ("self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests"),
        "runs before prepare_attn, which corrects the rows of logits",
    ),
    # Admission.
    HostContact("vllm.utils.import_utils:resolve_obj_by_qualname", ("qualname",), "called"),
    HostContact("vllm.v1.core.sched.scheduler:Scheduler", (), "base of a custom scheduler_cls"),
    HostContact("vllm.config:CompilationMode.STOCK_TORCH_COMPILE", (), "refused by name"),
    # Helpers that we call.
    HostContact(
        "vllm.v1.worker.gpu.attn_utils:init_attn_backend",
        ("kv_cache_config", "vllm_config", "device", "active_layer_names"),
        "called",
    ),
    HostContact(
        "vllm.v1.worker.gpu.attn_utils:build_attn_metadata",
        (
            "attn_groups",
            "num_reqs",
            "num_tokens",
            "query_start_loc_gpu",
            "query_start_loc_cpu",
            "max_query_len",
            "seq_lens",
            "max_seq_len",
            "block_tables",
            "slot_mappings",
            "kv_cache_config",
            "seq_lens_cpu_upper_bound",
        ),
        "called",
    ),
    HostContact(
        "vllm.v1.worker.gpu.attn_utils:build_slot_mappings_by_layer",
        ("slot_mappings", "kv_cache_config"),
        "called",
    ),
    HostContact(
        "vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings",
        ("self", "idx_mapping", "query_start_loc", "positions", "num_tokens_padded"),
        "called: -1 in idx_mapping makes a row's slots PAD",
    ),
    HostContact("vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor", (), "built"),
    HostContact("vllm.v1.worker.gpu.input_batch:InputBatch", (), "read"),
    HostContact("vllm.v1.worker.gpu.input_batch:InputBuffers", (), "read and written"),
    HostContact(
        "vllm.forward_context:set_forward_context",
        ("attn_metadata", "vllm_config", "num_tokens", "cudagraph_runtime_mode", "slot_mapping"),
        "called",
    ),
    HostContact("vllm.forward_context:override_forward_context", ("forward_context",), "called"),
    HostContact("vllm.forward_context:get_forward_context", (), "called"),
    # Metrics.
    HostContact(
        f"{MODEL_RUNNER_MODULE}:GPUModelRunner.sample_tokens",
        ("self", "grammar_output"),
        "wrapped in a LayerSkip engine's workers: its output carries the verify counts",
    ),
    HostContact(
        f"{_GPU}.async_utils:AsyncOutput.__init__",
        ("self", "model_runner_output"),
        "read: model_runner_output",
    ),
    HostContact(
        "vllm.config.scheduler:SchedulerConfig.get_scheduler_cls",
        ("self",),
        "wrapped: wraps update_from_output of the class that it returns",
    ),
    HostContact(
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        "wrapped: hands the verify counts on",
    ),
    HostContact(
        "vllm.v1.engine:EngineCoreOutputs.scheduler_stats", (), "read: statistics of a step"
    ),
    HostContact(
        "vllm.v1.metrics.stats:SchedulerStats",
        ("spec_decoding_stats",),
        "read: what a step drafted, if anything",
    ),
    HostContact(
        "vllm.v1.spec_decode.metrics:SpecDecodingStats",
        ("num_spec_tokens", "num_draft_tokens_per_pos"),
        "read, and lengthened on the way to the front end; vLLM fills it and reads it nowhere",
    ),
    HostContact(
        "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        ("self", "vllm_config", "engine_idxs"),
        "wrapped in a process that asked for LayerSkip: adds our series",
    ),
    HostContact(
        "vllm.v1.metrics.loggers:StatLoggerManager.record",
        ("self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
        "wrapped in a process that asked for LayerSkip: takes the verify counts",
    ),
    HostContact("vllm.v1.metrics.loggers:PrometheusStatLogger._counter_cls", (), "called"),
    HostContact("vllm.v1.metrics.loggers:PrometheusStatLogger._gauge_cls", (), "called"),
    HostContact(
        "vllm.v1.engine.llm_engine:LLMEngine.get_metrics",
        ("self",),
        "wrapped in a process that asked for LayerSkip: adds our series",
    ),
    *(
        HostContact(f"vllm.v1.metrics.reader:{name}", parameters, "built")
        for name, parameters in (
            ("Counter", ("name", "labels", "value")),
            ("Gauge", ("name", "labels", "value")),
            ("Vector", ("name", "labels", "values")),
        )
    ),
    # Offline batches.
    HostContact("vllm.exceptions:VLLMClientError", (), "caught: a request that is refused"),
    # Workers, and Model Runner V2 on a CPU.
    HostContact("vllm.config:ParallelConfig.worker_extension_cls", (), "set: layerskip_stats"),
    HostContact("vllm.platforms:vllm_version_matches_substr", ("substr",), "called"),
    HostContact("vllm.triton_utils.dispatcher:register_kernels", ("overrides",), "called"),
    HostContact("vllm.triton_utils.dispatcher:_registry", (), "read: what is registered"),
    *(
        HostContact(path, (), "replaced on a CPU")
        for path in (
            f"{_GPU}.block_table:_compute_slot_mappings_kernel",
            f"{_GPU}.input_batch:_prepare_pos_seq_lens_kernel",
            f"{_GPU}.input_batch:_combine_sampled_and_draft_tokens_kernel",
            f"{_GPU}.input_batch:_expand_idx_mapping_kernel",
            f"{_GPU}.input_batch:_get_num_sampled_and_rejected_kernel",
            f"{_GPU}.input_batch:_post_update_kernel",
            f"{_GPU}.sample.gumbel:_temperature_kernel",
            f"{_GPU}.sample.gumbel:_gumbel_sample_kernel",
            "vllm.v1.sample.ops.topk_topp_triton:_topk_topp_kernel",
            f"{_GPU}.spec_decode.rejection_sampler:_gather_draft_sampled_kernel",
            f"{_REJECTION}:_compute_local_logits_stats_kernel",
            f"{_REJECTION}:_rejection_kernel",
            f"{_REJECTION}:_resample_kernel",
            f"{_REJECTION}:_insert_resampled_kernel",
        )
    ),
    # Model.
    HostContact("vllm.compilation.decorators:support_torch_compile", (), "decorates the stages"),
    HostContact(
        "vllm.compilation.decorators:ignore_torch_compile",
        (),
        "decorates models that vLLM compiles as a whole",
    ),
    HostContact("vllm.compilation.backends:set_model_tag", ("tag",), "names a compiled stage"),
    HostContact(
        "vllm.ir.op:IrOp.set_priority",
        ("self", "priority"),
        "called: the exit norm, outside of the compiled stages, runs a fused kernel",
    ),
    HostContact("vllm.ir.op:IrOp.registry", (), "read: norms and their implementations"),
    HostContact(
        "vllm.model_executor.models.utils:extract_layer_index",
        ("layer_name",),
        "tells early attention layers from late ones",
    ),
)


def model_contacts(model: VllmModel) -> tuple[HostContact, ...]:
    """What a class of ours touches of the model that it derives from."""
    causal_lm, inputs = model.causal_lm, ("self", "input_ids", "positions")
    return (
        HostContact(f"{causal_lm}.__init__", ("self", "vllm_config", "prefix"), "called"),
        HostContact(
            f"{causal_lm}.forward",
            (*inputs, "intermediate_tensors", "inputs_embeds"),
            "overridden: early stage, then late stage",
        ),
        HostContact(
            f"{causal_lm}.compute_logits",
            ("self", "hidden_states"),
            "called with lm_head and logits_processor replaced",
        ),
        HostContact(f"{causal_lm}.load_weights", ("self", "weights"), "extended: counts"),
        HostContact(
            f"{model.backbone}.embed_input_ids", ("self", "input_ids"), "called by the early stage"
        ),
        HostContact(
            f"{model.layer}.forward", ("self", *model.layer_parameters), "called by the stages"
        ),
    )


def all_contacts() -> tuple[HostContact, ...]:
    """``CONTACTS`` and the contacts of every supported model, each once."""
    models = dict.fromkeys(model.vllm for model in SUPPORTED_ARCHITECTURES.values() if model.vllm)
    contacts = (contact for model in models for contact in model_contacts(model))
    return tuple({contact.path: contact for contact in (*CONTACTS, *contacts)}.values())
