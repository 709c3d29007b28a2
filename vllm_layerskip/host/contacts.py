# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM's internals that this plugin touches, as data.

``model_contacts`` adds the names of one model's classes. ``check.py`` compares all of them with the
vLLM that is installed, and ``tests/unit/host/test_contacts.py`` walks ``all_contacts()``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_layerskip.architectures import SUPPORTED_ARCHITECTURES, VllmModel

Kind = Literal["called", "wrapped", "overridden", "read", "subclassed"]
Process = Literal["front end", "scheduler", "worker", "every"]


@dataclass(frozen=True)
class HostContact:
    """One name of vLLM that we depend on."""

    path: str
    """``module:attribute.attribute``."""
    kind: Kind
    """What we do with it. ``subclassed``: our ``super().__init__`` calls this ``__init__``."""
    process: Process
    """Where: in the process of the API or of ``LLM``, the scheduler's, a worker's, or in each."""
    why: str
    parameters: tuple[str, ...] = ()
    """What we pass by name or position, or what our override must accept, in vLLM's order."""
    remove_when: str = ""
    """What vLLM would have to offer so that we need it no more; empty for an intended use."""


MODEL_RUNNER_MODULE = "vllm.v1.worker.gpu.model_runner"
EXECUTOR_MODULE = "vllm.v1.executor.abstract"

_GPU = "vllm.v1.worker.gpu"
_CONTEXT = "vllm.forward_context"
_LOGGERS = "vllm.v1.metrics.loggers"
_REGISTRY = "vllm.model_executor.models.registry"
_ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"
_HEAD = "vllm.model_executor.layers.vocab_parallel_embedding"
_CONFIG = "vllm.config.speculative:SpeculativeConfig"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_DRAFT_GRAPHS = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils"
_MODEL_STATE = "vllm.v1.worker.gpu.model_states.default:DefaultModelState"
_SPECULATOR = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
_LINEAR = "vllm.model_executor.layers.linear"
_KERNELS = "vllm.model_executor.kernels.linear"
_QUANT = "vllm.model_executor.layers.quantization.utils.quant_utils"
_PARAMETER = "vllm.model_executor.parameter"
_REJECTION = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"

_METHODS = "vLLM lets a plugin register a speculative method"
_FLAGS = "vLLM lets a plugin add engine arguments"
_STATISTICS = "vLLM carries a plugin's statistics from workers to loggers"
_TWINS = "vLLM lets a plugin see weights before they are packed"
_CPU_KERNELS = "vLLM's CPU build has kernels of its own for Model Runner V2"
_LOGPROBS = "vLLM's rejection sampler reads logprob_token_ids"
_INTERPRETER = "vLLM runs Triton's interpreter on a CPU by itself"

# fmt: off
CONTACTS: tuple[HostContact, ...] = (
    # A request: flags, config, model.
    HostContact(f"{_ENGINE_ARGS}.create_speculative_config", "wrapped", "front end",
                "builds a LayerSkipConfig if the request asks for LayerSkip",
                ("self", "target_model_config", "target_parallel_config"), remove_when=_METHODS),
    HostContact(f"{_ENGINE_ARGS}.create_model_config", "wrapped", "front end",
                "early exit calls it with hf_overrides for E layers", ("self",),
                remove_when=_FLAGS),
    HostContact(f"{_ENGINE_ARGS}.add_cli_args", "wrapped", "front end", "adds our flags",
                ("parser",), remove_when=_FLAGS),
    HostContact(f"{_ENGINE_ARGS}.from_cli_args", "wrapped", "front end",
                "folds our flags into speculative_config", ("args",), remove_when=_FLAGS),
    HostContact(f"{_GPU}.spec_decode:init_speculator", "wrapped", "worker",
                "returns a LayerSkipSpeculator for a LayerSkipConfig",
                ("vllm_config", "device", "req_states"), remove_when=_METHODS),
    HostContact(f"{MODEL_RUNNER_MODULE}:init_speculator", "wrapped", "worker",
                "the runner calls it by this name", ("vllm_config", "device", "req_states"),
                remove_when=_METHODS),
    HostContact(f"{_REGISTRY}:ModelRegistry.register_model", "called", "every",
                "registers our model classes", ("model_arch", "model_cls")),
    HostContact(f"{_REGISTRY}:_LazyRegisteredModel", "read", "front end",
                "tells which class vLLM runs for an architecture", ("module_name", "class_name")),
    HostContact(f"{_REGISTRY}:_BaseRegisteredModel.load_model_cls", "called", "front end",
                "loads a class that was registered as an object", ("self",)),
    HostContact(f"{_CONFIG}.__post_init__", "overridden", "front end",
                "sets method draft_model, with the target as its model", ("self",),
                remove_when=_METHODS),
    HostContact(f"{_CONFIG}.compute_hash", "overridden", "every", "adds E, K and our version",
                ("self",), remove_when="vLLM hashes the method and K"),
    HostContact(f"{_CONFIG}.max_num_new_slots_for_drafting", "overridden", "every",
                "is 0: drafting starts at the sampled token"),
    HostContact(f"{_CONFIG}.update_arch_", "called", "front end",
                "finds the model class again, under our architecture", ("self",)),
    HostContact(f"{_CONFIG}._verify_args", "called", "front end",
                "vLLM checks our config with it too", ("self",)),
    HostContact("vllm.config:VllmConfig.num_lookahead_tokens", "read", "scheduler",
                "reserves K slots for drafts"),
    HostContact("vllm.config:VllmConfig.use_v2_model_runner", "read", "every", "must be true"),
    # Early exit.
    HostContact(f"{_REGISTRY}:ModelRegistry", "read", "worker",
                "names the class that an early-exit class derives from"),
    HostContact(f"{_REGISTRY}:_LazyRegisteredModel.load_model_cls", "called", "worker",
                "loads the class that an early-exit class derives from", ("self",)),
    HostContact("vllm.config:ModelConfig.get_total_num_hidden_layers", "called", "every",
                "gives L of a model", ("self",)),
    HostContact("vllm.config:ModelConfig.architecture", "read", "front end",
                "names the model's architecture"),
    # The speculator.
    HostContact(f"{_SPECULATOR}.__init__", "subclassed", "worker",
                "makes a drafter's buffers and settings", ("self", "vllm_config", "device")),
    HostContact(f"{_SPECULATOR}.load_model", "overridden", "worker", "LayerSkip loads no weights",
                ("self", "target_model")),
    HostContact(f"{_SPECULATOR}.load_draft_model", "overridden", "worker",
                "takes the target as the draft model",
                ("self", "target_model", "target_attn_layer_names")),
    HostContact(f"{_SPECULATOR}.set_attn", "overridden", "worker",
                "gives vLLM's set_attn the early layers' names",
                ("self", "model_state", "kv_cache_config", "block_tables",
                 "target_input_buffers", "target_attn_groups")),
    HostContact(f"{_SPECULATOR}.propose", "overridden", "worker", "runs the K draft passes",
                ("self", "input_batch", "attn_metadata", "slot_mappings", "last_hidden_states",
                 "aux_hidden_states", "num_sampled", "num_rejected", "last_sampled",
                 "next_prefill_tokens", "temperature", "seeds", "dp_sync_state", "dummy_run",
                 "skip_attn_for_dummy_run", "mm_inputs", "is_profile", "num_speculative_tokens")),
    HostContact(f"{_SPECULATOR}.init_cudagraph_manager", "overridden", "worker",
                "makes our graph manager", ("self", "cudagraph_mode")),
    HostContact(f"{_SPECULATOR}.capture", "overridden", "worker",
                "captures all passes as one graph", ("self",)),
    HostContact(f"{_SPECULATOR}.sample_draft", "called", "worker", "draws a draft token",
                ("self", "hidden_states", "sample_src_positions", "idx_mapping", "temperature",
                 "seeds", "draft_step", "draft_logits")),
    HostContact(f"{_SPECULATOR}._copy_request_inputs", "called", "worker",
                "copies temperatures and seeds of the rows",
                ("self", "num_reqs", "idx_mapping", "temperature", "seeds", "dummy_run")),
    HostContact(f"{_SPECULATOR}._build_uniform_attn_metadata", "called", "worker",
                "builds a draft pass's attention metadata",
                ("self", "batch_desc", "num_reqs", "num_query_per_req",
                 "seq_lens_cpu_upper_bound", "step")),
    HostContact(f"{_SPECULATOR}._update_draft_decode_metadata", "called", "worker",
                "updates attention metadata for the next pass, in the draft graph",
                ("self", "attn_metadata", "num_reqs")),
    HostContact(f"{_SPECULATOR}._validate_local_argmax_reduction", "called", "worker",
                "checks use_local_argmax_reduction", ("self",)),
    HostContact(f"{_SPECULATOR}.compute_draft_logits", "overridden", "worker",
                "computes logits with the draft head", ("self", "hidden_states", "spec_step_idx")),
    HostContact(f"{_SPECULATOR}.get_draft_top_tokens", "overridden", "worker",
                "takes argmaxes of the draft head", ("self", "hidden_states", "spec_step_idx")),
    # The draft head.
    HostContact(f"{_HEAD}:ParallelLMHead.__init__", "called", "worker",
                "holds the rows of the draft vocabulary",
                ("self", "num_embeddings", "embedding_dim", "bias", "params_dtype",
                 "padding_size", "disable_tp")),
    HostContact(f"{_HEAD}:VocabParallelEmbeddingShardIndices.__init__", "read", "worker",
                "tells which rows a rank holds",
                ("self", "org_vocab_start_index", "org_vocab_end_index")),
    HostContact(f"{_HEAD}:DEFAULT_VOCAB_PADDING_SIZE", "read", "worker",
                "pads the draft head as vLLM pads a head"),
    HostContact(f"{_HEAD}:UnquantizedEmbeddingMethod.process_weights_after_loading", "called",
                "worker", "runs after the rows are copied", ("self", "layer")),
    HostContact(f"{_LINEAR}:UnquantizedLinearMethod", "read", "worker",
                "marks a plain LM head, as UnquantizedEmbeddingMethod does"),
    HostContact("vllm.model_executor.layers.logits_processor:LogitsProcessor.get_top_tokens",
                "called", "worker", "runs on a copy with the draft head's vocabulary sizes",
                ("self", "lm_head", "hidden_states", "embedding_bias")),
    HostContact("vllm.distributed:tensor_model_parallel_all_reduce", "called", "worker",
                "adds up the rows of all shards", ("input_",)),
    HostContact("vllm.transformers_utils.repo_utils:get_hf_file_bytes", "called", "front end",
                "reads a draft vocabulary from a checkpoint on the model hub",
                ("file_name", "model", "revision")),
    # The draft twin.
    HostContact(f"{_LINEAR}:LinearBase", "read", "worker",
                "marks the layers of which a twin has others"),
    HostContact(f"{_LINEAR}:LinearBase.__init__", "read", "worker",
                "sets quant_method, which a twin's layer replaces",
                ("self", "input_size", "output_size")),
    HostContact(f"{_LINEAR}:QKVParallelLinear", "read", "worker",
                "names its shards q, k and v, where an adapter's parts go"),
    HostContact(f"{_LINEAR}:LinearMethodBase.create_weights", "overridden", "worker",
                "is not called: a twin's weights are made from the target's"),
    HostContact(f"{_LINEAR}:LinearMethodBase.apply", "overridden", "worker",
                "runs one of vLLM's kernels on a twin's weights", ("self", "layer", "x", "bias")),
    HostContact(f"{_LINEAR}:UnquantizedLinearMethod.apply", "called", "worker",
                "runs a twin's layers of full width", ("self", "layer", "x", "bias")),
    HostContact(f"{_LINEAR}:UnquantizedLinearMethod.process_weights_after_loading", "wrapped",
                "worker", "makes the twin's weight before vLLM packs the target's",
                ("self", "layer"), remove_when=_TWINS),
    HostContact(f"{_KERNELS}:MPLinearLayerConfig", "called", "worker",
                "describes a twin's 4-bit layer",
                ("full_weight_shape", "partition_weight_shape", "weight_type", "act_type",
                 "group_size", "zero_points")),
    HostContact(f"{_KERNELS}:choose_mp_linear_kernel", "called", "worker",
                "chooses the kernel of 4-bit weights", ("config",)),
    HostContact(f"{_KERNELS}:init_int8_linear_kernel", "called", "worker",
                "chooses the kernel of 8-bit integers",
                ("is_channelwise", "is_static_input_scheme", "input_symmetric", "module_name")),
    HostContact(f"{_KERNELS}:init_fp8_linear_kernel", "called", "worker",
                "chooses the kernel of FP8 weights",
                ("activation_quant_key", "weight_quant_key", "input_dtype", "out_dtype",
                 "weight_shape", "module_name")),
    HostContact(f"{_KERNELS}.mixed_precision.MPLinearKernel:MPLinearKernel.__init__", "called",
                "worker", "takes the names of a layer's tensors",
                ("self", "c", "w_q_param_name", "w_s_param_name", "w_zp_param_name")),
    HostContact(f"{_KERNELS}.mixed_precision.MPLinearKernel:MPLinearKernel.apply_weights",
                "called", "worker", "multiplies by 4-bit weights", ("self", "layer", "x", "bias")),
    HostContact(f"{_KERNELS}.mixed_precision.MPLinearKernel:"
                "MPLinearKernel.process_weights_after_loading", "called", "worker",
                "repacks compressed-tensors' format", ("self", "layer")),
    HostContact(f"{_KERNELS}.scaled_mm.ScaledMMLinearKernel:ScaledMMLinearKernel.apply_weights",
                "called", "worker", "multiplies by 8-bit weights", ("self", "layer", "x", "bias")),
    HostContact(f"{_KERNELS}.scaled_mm.ScaledMMLinearKernel:"
                "ScaledMMLinearKernel.process_weights_after_loading", "called", "worker",
                "repacks 8-bit weights", ("self", "layer")),
    HostContact(f"{_QUANT}:pack_quantized_values_into_int32", "called", "worker",
                "packs 4-bit values", ("w_q", "wtype", "packed_dim")),
    *(
        HostContact(f"{_QUANT}:{name}", "read", "worker", "says how an FP8 twin has its scales")
        for name in ("kFp8DynamicTensorSym", "kFp8DynamicTokenSym", "kFp8StaticChannelSym",
                     "kFp8StaticTensorSym")
    ),
    HostContact(f"{_PARAMETER}:PackedvLLMParameter.__init__", "called", "worker",
                "holds packed values, with the layout that kernels look for",
                ("self", "packed_factor", "packed_dim")),
    HostContact(f"{_PARAMETER}:GroupQuantScaleParameter", "called", "worker",
                "holds scales, with the layout that kernels look for"),
    HostContact("vllm.scalar_type:scalar_types.uint4", "read", "worker", "4 bits, zero points"),
    HostContact("vllm.scalar_type:scalar_types.uint4b8", "read", "worker", "4 bits, symmetric"),
    HostContact("vllm.utils.torch_utils:set_default_torch_dtype", "called", "worker",
                "repacks in the model's dtype, as at load", ("dtype",)),
    # CUDA graphs.
    HostContact(f"{_DRAFT_GRAPHS}:SpeculatorCudaGraphManager.__init__", "subclassed", "worker",
                "fills _capture_descs, which we extend to every K in use",
                ("self", "vllm_config", "device", "cudagraph_mode", "decode_query_len")),
    HostContact(f"{_DRAFT_GRAPHS}:SpeculatorCudaGraphManager.capture", "called", "worker",
                "captures the draft passes",
                ("self", "forward_fn", "model_state", "input_buffers", "block_tables",
                 "attn_groups", "kv_cache_config", "progress_bar_desc")),
    HostContact(f"{_DRAFT_GRAPHS}:SpeculatorCudaGraphManager.specialize_spec_tokens", "called",
                "worker", "finds the graph for a K", ("self", "desc", "num_speculative_tokens")),
    HostContact(f"{_DRAFT_GRAPHS}:SpeculatorBatchDescriptor", "called", "worker",
                "describes a graph for a K",
                ("cg_mode", "num_tokens", "num_reqs", "uniform_token_count",
                 "num_speculative_tokens")),
    HostContact(f"{_GRAPHS}:CudaGraphManager.dispatch", "called", "worker",
                "finds the graph for a batch size",
                ("self", "num_reqs", "num_tokens", "uniform_token_count", "num_active_loras")),
    HostContact(f"{_GRAPHS}:CudaGraphManager._init_candidates", "wrapped", "worker",
                "with a schedule, offers a batch the decode graphs of every query length",
                ("self",),
                remove_when="vLLM itself offers them all and captures only the schedule's"),
    HostContact(f"{_GPU}.warmup:warmup_kernels", "read", "worker",
                "names its requests _warmup_...; their steps are not counted",
                ("model_runner", "worker_execute_model", "worker_sample_tokens")),
    HostContact(f"{_GRAPHS}:CudaGraphManager.run_fullgraph", "called", "worker",
                "replays the draft passes", ("self", "desc")),
    HostContact(f"{_GRAPHS}:CudaGraphManager.needs_capture", "called", "worker",
                "tells whether there is a graph to capture", ("self",)),
    HostContact("vllm.v1.spec_decode.dynamic.utils:build_dynamic_sd_schedule_lookup", "called",
                "worker", "gives K by batch size",
                ("num_speculative_tokens_per_batch_size", "vllm_max_batch_size",
                 "vllm_num_speculative_tokens")),
    HostContact(f"{_CONFIG}.uses_dynamic_speculative_decoding", "called", "worker",
                "tells whether there is a schedule", ("self",)),
    HostContact("vllm.config.compilation:CUDAGraphMode.separate_routine", "called", "worker",
                "tells whether decodes have graphs of their own", ("self",)),
    HostContact("vllm.v1.worker.utils:AttentionGroup.map_to_kernel_block_table", "called", "worker",
                "maps block tables before a draft graph replays", ("self", "block_table")),
    # The model state.
    HostContact(f"{_MODEL_STATE}.__init__", "subclassed", "worker",
                "makes the model's state between steps",
                ("self", "vllm_config", "model", "encoder_cache", "device")),
    HostContact(f"{_MODEL_STATE}.add_request", "overridden", "worker",
                "drops a slot's old exit states", ("self", "req_index", "new_req_data")),
    HostContact(f"{_MODEL_STATE}.initialize_kv_cache", "overridden", "worker",
                "makes metadata builders for the early stage",
                ("self", "kv_cache_config", "block_tables")),
    HostContact(f"{_MODEL_STATE}.prepare_attn", "overridden", "worker",
                "decides whether a verify step reuses, and attaches its plan",
                ("self", "input_batch", "cudagraph_mode", "block_tables", "slot_mappings",
                 "attn_groups", "kv_cache_config", "for_capture")),
    HostContact(f"{_GPU}.model_states:resolve_model_state_cls", "called", "worker",
                "asks the model for its state class", ("vllm_config", "model")),
    # Log probabilities of named token ids.
    HostContact(f"{_MODEL_STATE}.custom_sampler", "overridden", "worker",
                "gives the runner our rejection sampler", ("self", "sampler")),
    HostContact(f"{_GPU}.spec_decode.rejection_sampler:RejectionSampler.__init__", "subclassed",
                "worker", "takes vLLM's sampler", ("self", "sampler", "spec_config", "device"),
                remove_when=_LOGPROBS),
    *(
        HostContact(f"{_GPU}.spec_decode.rejection_sampler:RejectionSampler.{name}", "overridden",
                    "worker", why, ("self", *parameters), remove_when=_LOGPROBS)
        for name, why, parameters in (
            ("__call__", "learns how many token ids a batch's requests name",
             ("logits", "input_batch", "draft_logits", "invalid_drafts")),
            ("_verify", "learns which requests are being verified",
             ("logits", "draft_logits", "draft_sampled", "pos", "cu_num_logits", "idx_mapping",
              "idx_mapping_np", "expanded_idx_mapping")),
            ("_get_logprobs_tensors", "adds the columns of named token ids",
             ("sampled", "num_sampled", "logits", "cu_num_logits", "cu_num_logits_np",
              "max_num_logprobs")),
        )
    ),
    HostContact(f"{_GPU}.sample.logprob:compute_topk_scores", "called", "worker",
                "gives log probabilities, as vLLM's sampler asks for them",
                ("logits", "num_logprobs", "sampled_token_ids", "cu_num_logits",
                 "logprob_token_ids_state", "expanded_idx_mapping", "max_per_req_token_ids",
                 "logits_mode"), remove_when=_LOGPROBS),
    HostContact(f"{_GPU}.sample.logprob:LogprobTokenIdsState.max_num_token_ids", "called", "worker",
                "counts the token ids that a batch's requests name", ("self", "idx_mapping_np"),
                remove_when=_LOGPROBS),
    # Changes of weights.
    HostContact(f"{EXECUTOR_MODULE}:Executor.collective_rpc", "wrapped", "scheduler",
                "its overrides announce calls that may change weights",
                ("self", "method", "timeout", "args", "kwargs"),
                remove_when="vLLM tells a speculator that weights changed"),
    HostContact(f"{EXECUTOR_MODULE}:Executor.__init__", "read", "scheduler",
                "sets speculative_config", ("self", "vllm_config")),
    HostContact("vllm.v1.worker.worker_base:WorkerBase.get_model", "called", "worker",
                "gives the model that counts changes of its weights", ("self",)),
    # LoRA.
    HostContact("vllm.lora.model_manager:LoRAModelManager.set_adapter_mapping", "called", "worker",
                "maps rows of drafts and of verify logits to adapters", ("self", "mapping"),
                remove_when="vLLM maps 1 + K rows of logits per verified request"),
    HostContact("vllm.lora.layers:LoRAMapping", "called", "worker",
                "built as in LoRAModelRunnerMixin._set_active_loras",
                ("index_mapping", "prompt_mapping", "is_prefill")),
    HostContact(f"{_GPU}.lora_utils:NO_LORA_ID", "read", "worker",
                "stands for a row of the base model"),
    HostContact("vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin._set_active_loras",
                "read", "worker", "runs before prepare_attn, which corrects the rows of logits",
                ("self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests")),
    # Admission.
    HostContact("vllm.utils.import_utils:resolve_obj_by_qualname", "called", "front end",
                "resolves a scheduler_cls that is given as a name", ("qualname",)),
    HostContact("vllm.v1.core.sched.scheduler:Scheduler", "read", "front end",
                "a custom scheduler_cls must derive from it"),
    HostContact("vllm.config:CompilationMode.STOCK_TORCH_COMPILE", "read", "front end",
                "is refused by name"),
    # Passes: attention metadata, slots, forward context.
    HostContact(f"{_GPU}.attn_utils:init_attn_backend", "called", "worker",
                "makes metadata builders for the early stage",
                ("kv_cache_config", "vllm_config", "device", "active_layer_names")),
    HostContact(f"{_GPU}.attn_utils:build_attn_metadata", "called", "worker",
                "builds attention metadata for the early stage of a verify step",
                ("attn_groups", "num_reqs", "num_tokens", "query_start_loc_gpu",
                 "query_start_loc_cpu", "max_query_len", "seq_lens", "max_seq_len",
                 "block_tables", "slot_mappings", "kv_cache_config", "seq_lens_cpu_upper_bound")),
    HostContact(f"{_GPU}.attn_utils:build_slot_mappings_by_layer", "called", "worker",
                "splits slot mappings by layer", ("slot_mappings", "kv_cache_config")),
    HostContact(f"{_GPU}.block_table:BlockTables.compute_slot_mappings", "called", "worker",
                "-1 in idx_mapping makes a row's slots PAD",
                ("self", "idx_mapping", "query_start_loc", "positions", "num_tokens_padded")),
    HostContact(f"{_GRAPHS}:BatchExecutionDescriptor", "called", "worker",
                "describes drafts without a graph"),
    HostContact(f"{_GPU}.input_batch:InputBatch", "read", "worker", "the batch of a step"),
    HostContact(f"{_GPU}.input_batch:InputBuffers", "read", "worker",
                "holds the drafts' inputs; we also write them"),
    HostContact(f"{_CONTEXT}:set_forward_context", "called", "worker",
                "runs a stage with metadata of its own",
                ("attn_metadata", "vllm_config", "num_tokens", "cudagraph_runtime_mode",
                 "slot_mapping")),
    HostContact(f"{_CONTEXT}:override_forward_context", "called", "worker",
                "runs the early stage within a forward", ("forward_context",)),
    HostContact(f"{_CONTEXT}:get_forward_context", "called", "worker",
                "carries a verify step's plan to the forward"),
    # Counts, from workers to metrics.
    HostContact(f"{MODEL_RUNNER_MODULE}:GPUModelRunner.sample_tokens", "wrapped", "worker",
                "its output carries the verify counts", ("self", "grammar_output"),
                remove_when=_STATISTICS),
    HostContact(f"{_GPU}.async_utils:AsyncOutput.__init__", "read", "worker",
                "its model_runner_output carries the verify counts",
                ("self", "model_runner_output"), remove_when=_STATISTICS),
    HostContact("vllm.config.scheduler:SchedulerConfig.get_scheduler_cls", "wrapped", "scheduler",
                "wraps update_from_output of the class that it returns", ("self",),
                remove_when=_STATISTICS),
    HostContact("vllm.v1.core.sched.scheduler:Scheduler.update_from_output", "wrapped", "scheduler",
                "hands the verify counts on", ("self", "scheduler_output", "model_runner_output"),
                remove_when=_STATISTICS),
    HostContact("vllm.v1.engine:EngineCoreOutputs.scheduler_stats", "read", "scheduler",
                "the statistics of a step", remove_when=_STATISTICS),
    HostContact("vllm.v1.metrics.stats:SchedulerStats", "read", "front end",
                "tells what a step drafted, if anything", ("spec_decoding_stats",),
                remove_when=_STATISTICS),
    HostContact("vllm.v1.spec_decode.metrics:SpecDecodingStats", "read", "front end",
                "its num_draft_tokens_per_pos, which vLLM reads nowhere, carries the counts",
                ("num_spec_tokens", "num_draft_tokens_per_pos"), remove_when=_STATISTICS),
    HostContact(f"{_LOGGERS}:StatLoggerManager.__init__", "wrapped", "front end", "adds our series",
                ("self", "vllm_config", "engine_idxs"), remove_when=_STATISTICS),
    HostContact(f"{_LOGGERS}:StatLoggerManager.record", "wrapped", "front end",
                "takes the verify counts",
                ("self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
                remove_when=_STATISTICS),
    HostContact(f"{_LOGGERS}:PrometheusStatLogger._counter_cls", "called", "front end",
                "Prometheus's or Ray's counter"),
    HostContact(f"{_LOGGERS}:PrometheusStatLogger._gauge_cls", "called", "front end",
                "Prometheus's or Ray's gauge"),
    HostContact("vllm.v1.engine.llm_engine:LLMEngine.get_metrics", "wrapped", "front end",
                "adds our series", ("self",),
                remove_when="vLLM reports series whose names do not begin with vllm:"),
    *(
        HostContact(f"vllm.v1.metrics.reader:{name}", "called", "front end", "reports our series",
                    parameters)
        for name, parameters in (
            ("Counter", ("name", "labels", "value")),
            ("Gauge", ("name", "labels", "value")),
            ("Vector", ("name", "labels", "values")),
        )
    ),
    # Offline batches.
    HostContact("vllm.v1.engine.exceptions:EngineDeadError", "read", "front end",
                "ends a batch, where every other error is one request's"),
    HostContact("vllm.v1.engine.llm_engine:LLMEngine.__init__", "read", "front end",
                "errors before it are about arguments, errors within it about the engine's start"),
    # Model Runner V2 on a CPU.
    HostContact("vllm.platforms:vllm_version_matches_substr", "called", "every",
                "tells a CPU build", ("substr",), remove_when=_INTERPRETER),
    HostContact("vllm.triton_utils.dispatcher:register_kernels", "called", "worker",
                "has torch functions run in place of kernels", ("overrides",),
                remove_when=_CPU_KERNELS),
    HostContact("vllm.triton_utils.dispatcher:_registry", "read", "worker",
                "tells what is registered", remove_when=_CPU_KERNELS),
    *(
        HostContact(
            path, "overridden", "worker", "a torch function runs in its place",
            remove_when=_CPU_KERNELS,
        )
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
    # The stages.
    HostContact("vllm.compilation.decorators:support_torch_compile", "called", "worker",
                "compiles the stages"),
    HostContact("vllm.compilation.decorators:ignore_torch_compile", "called", "worker",
                "keeps vLLM from compiling a model as a whole"),
    HostContact("vllm.compilation.backends:set_model_tag", "called", "worker",
                "names a compiled stage", ("tag",)),
    HostContact("vllm.ir.op:IrOp.set_priority", "called", "worker",
                "has the exit norm, outside the compiled stages, run a fused kernel",
                ("self", "priority")),
    HostContact("vllm.ir.op:IrOp.registry", "read", "worker", "lists the norms' implementations"),
    HostContact("vllm.model_executor.models.utils:extract_layer_index", "called", "worker",
                "tells early attention layers from late ones", ("layer_name",)),
)


def model_contacts(model: VllmModel) -> tuple[HostContact, ...]:
    """What one of our classes touches of the model that it derives from."""
    causal_lm, inputs = model.causal_lm, ("self", "input_ids", "positions")
    return (
        HostContact(
            f"{causal_lm}.__init__", "subclassed", "worker", "builds the model",
            ("self", "vllm_config", "prefix"),
        ),
        HostContact(
            f"{causal_lm}.forward", "overridden", "worker", "runs the early stage, then the late",
            (*inputs, "intermediate_tensors", "inputs_embeds"),
        ),
        HostContact(
            f"{causal_lm}.compute_logits", "called", "worker",
            "drafts use another lm_head and logits_processor", ("self", "hidden_states"),
        ),
        HostContact(
            f"{causal_lm}.load_weights", "overridden", "worker",
            "counts its calls: copies of older weights are stale", ("self", "weights"),
        ),
        HostContact(
            f"{model.backbone}.embed_input_ids", "called", "worker", "embeds token ids",
            ("self", "input_ids"),
        ),
        HostContact(
            f"{model.layer}.forward", "called", "worker", "runs a layer of a stage",
            ("self", *model.layer_parameters),
        ),
    )
# fmt: on


def all_contacts() -> tuple[HostContact, ...]:
    """``CONTACTS`` and the contacts of every supported model, each once."""
    models = dict.fromkeys(model.vllm for model in SUPPORTED_ARCHITECTURES.values() if model.vllm)
    contacts = (contact for model in models for contact in model_contacts(model))
    return tuple({contact.path: contact for contact in (*CONTACTS, *contacts)}.values())
