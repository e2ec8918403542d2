"""What is generated from the code: the OpenAPI document, the page that shows it, the reference pages."""
