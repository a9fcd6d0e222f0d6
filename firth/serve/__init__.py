"""An HTTP server for trained models: OpenAI's routes, firth's own routes, and pages."""
