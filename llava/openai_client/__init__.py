"""One client of language-model servers: settings, requests, limits of rate and money, the Batch API."""
