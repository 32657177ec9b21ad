"""`python -m peft_kernels tune`: measure this GPU, and keep the fastest tiles.

    python -m peft_kernels tune                       everything; go on where the last run stopped
    python -m peft_kernels tune --minutes 10          stop after ten minutes; run it again to go on
    python -m peft_kernels tune --op lora_linear      one op package (may be given several times)
    python -m peft_kernels tune --dry-run             only say what would be measured; needs no GPU

Every candidate of every tile function (`configs.py` of each op package) is first held against plain PyTorch and
float64, and dropped, by name, where it is wrong; one that does not compile or wants more than the GPU has is skipped
and counted. The rest are timed in turns by CUDA events with a cold L2 cache, and the smallest median wins. What decides
the most comes first: from which size on one path is faster than another, with the rules' tiles or those of an earlier
run; then tiles. A run that ends early leaves a bound for the first: the path in question is taken where it was seen to
be faster. A candidate that loses the GPU ends the run; it is noted, and the next run goes on behind it. Measurements
are appended, line by line, to `<cache>/<GPU>/<op package>.rows.jsonl`, so a run that is killed loses one of them at
most; the table `<op package>.json` beside it is written at the end, and read by the kernels at the first launch of the
next process. The cache is PEFT_KERNELS_CACHE, else peft_kernels in XDG_CACHE_HOME or ~/.cache. Deleting the folder
starts afresh.

The current device is measured (CUDA_VISIBLE_DEVICES chooses it); nothing else should run on it meanwhile.
"""
