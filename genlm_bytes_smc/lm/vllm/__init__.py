"""Models that vLLM runs, by its public interface alone; only `engine.VLLMEngine` is for others."""
