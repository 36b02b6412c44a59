"""Azure Service Bus, on azure-servicebus."""
