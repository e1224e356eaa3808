"""Run llama.cpp's server. The environment of `make test-llama-cpp` runs this file, and has no other package than xllamacpp."""

from __future__ import annotations

import sys
import time

import xllamacpp


def main(model: str, port: str, slots: str, parallel: str, unified: str, cache: str, flash: str) -> None:
    """Serve a model; print a line when the server listens."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.port = int(port)
    params.slot_save_path = slots + "/"
    params.endpoint_slots = True
    params.n_ctx = 512 * int(parallel)
    params.n_parallel = int(parallel)
    params.kv_unified = unified == "True"
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{flash.upper()}")
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    print(f"listening at {server.listening_address}", flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
