"""What a model can do: the toy skills that code grades, and the public benchmarks through lm-evaluation-harness."""
