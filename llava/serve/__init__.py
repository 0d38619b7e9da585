"""Terminal chat, and the servers: controller, workers, the OpenAI API and the web page."""
