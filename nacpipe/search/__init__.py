"""The search wing: CPU only, never torch. Scoring, the study, evaluation."""
