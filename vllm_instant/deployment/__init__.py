"""The deployment file, the sources of its values, the plugins it names and the breaker around them."""
