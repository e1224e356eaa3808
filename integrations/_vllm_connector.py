"""The KV connector that vLLM loads. Importing this module imports vLLM and installs the check of requests."""

from __future__ import annotations

from typing import Any

import vllm

from softhooks.integrations._vllm_plan import Step
from softhooks.integrations._vllm_requests import install
from softhooks.integrations._vllm_scheduler import PrefixScheduler
from softhooks.integrations._vllm_settings import (
    folder_of,
    require_configuration,
    require_layers,
    require_version,
    served_model,
)
from softhooks.integrations._vllm_worker import PrefixWorker

require_version(vllm.__version__)

from vllm.distributed import get_tensor_model_parallel_rank  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

install()


class StepMetadata(KVConnectorMetadata):
    """A step's work, as vLLM passes it to the workers."""

    def __init__(self, step: Step) -> None:
        self.step = step


class SoftPromptConnector(KVConnectorBase_V1, SupportsHMA):
    """Serve softhooks' prompts: requests that name a prompt find its keys and values in the cache, before their text."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        require_configuration(vllm_config)
        require_layers(vllm_config, kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        if role == KVConnectorRole.SCHEDULER:
            folder = folder_of(vllm_config)
            for found in folder.read_all():
                served_model(vllm_config).require_fit(found)
            self.scheduler = PrefixScheduler(folder, [group.kv_cache_spec.block_size for group in groups])
        else:
            size = vllm_config.parallel_config.tensor_parallel_size
            rank = get_tensor_model_parallel_rank() if size > 1 else 0
            self.worker = PrefixWorker([list(group.layer_names) for group in groups], rank, size)

    # --- in the scheduler ---

    def on_new_request(self, request: Any) -> None:
        """Give a request its virtual tokens."""
        self.scheduler.admit(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Return the number of virtual tokens to write."""
        result: tuple[int, bool] = self.scheduler.num_new_tokens(request, num_computed_tokens)
        return result

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the writes for a request that has got its blocks."""
        self.scheduler.plan(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """Return the work of this step."""
        return StepMetadata(self.scheduler.take_step())

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        """Forget a request; its blocks can be freed at once."""
        self.scheduler.finish(request.request_id)
        return False, None

    # --- in the workers ---

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write the prefixes of this step to the cache, before the layers run."""
        self.worker.run(self._get_connector_metadata().step, forward_context.no_compile_layers)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Report the requests whose prompt was lost; vLLM answers them with an error."""
        failed = self.worker.take_failed()
        return KVConnectorTransferResults(finished_recving=set(failed), failed_recving=failed)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: everything was written before the layers run."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: the connector only reads prompts."""

    def wait_for_save(self) -> None:
        """Do nothing: the connector only reads prompts."""
