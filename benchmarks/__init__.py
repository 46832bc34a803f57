"""Side-by-side measurements of gracile: resumable cells that write Records to `results/`.

python -m benchmarks.run --tier smoke      # under two minutes
python -m benchmarks.tables                # docs/benchmarks.md from results/*.jsonl
"""
