"""Pictures for files of prompts, by any number of workers that share nothing but the output storage."""
