"""What is measured, the runner that measures it behind a correctness gate, and the results as data.

python -m benchmarks list
python -m benchmarks run --rows 1,2 --budget-seconds 400
python -m benchmarks table
python -m benchmarks figures
"""
